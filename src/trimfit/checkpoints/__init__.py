"""Loading and saving Hugging Face checkpoints, all or nothing."""

from trimfit.checkpoints.atomic import SIDECAR as SIDECAR
from trimfit.checkpoints.atomic import atomic_directory as atomic_directory
from trimfit.checkpoints.atomic import check_output as check_output
from trimfit.checkpoints.atomic import is_disk_full as is_disk_full
from trimfit.checkpoints.atomic import rename_durably as rename_durably
from trimfit.checkpoints.atomic import write_durably as write_durably
from trimfit.checkpoints.load import Checkpoint as Checkpoint
from trimfit.checkpoints.load import fingerprint as fingerprint
from trimfit.checkpoints.load import load_checkpoint as load_checkpoint
from trimfit.checkpoints.load import load_tokenizer as load_tokenizer
from trimfit.checkpoints.load import read_config as read_config
from trimfit.checkpoints.load import resolve_device as resolve_device
from trimfit.checkpoints.save import check_space as check_space
from trimfit.checkpoints.save import save_checkpoint as save_checkpoint
from trimfit.checkpoints.save import write_sidecar as write_sidecar
