"""The loops that join the rooms."""

from trimfit.pipelines.config import PruneConfig as PruneConfig
from trimfit.pipelines.observer import Finished as Finished
from trimfit.pipelines.observer import Observer as Observer
from trimfit.pipelines.prune import prune as prune
from trimfit.pipelines.prune_checkpoint import prune_checkpoint as prune_checkpoint
from trimfit.pipelines.prune_checkpoint import save_pruned as save_pruned
from trimfit.pipelines.quantize import quantize as quantize
from trimfit.pipelines.quantize_checkpoint import check_format as check_format
from trimfit.pipelines.quantize_checkpoint import quantize_checkpoint as quantize_checkpoint
from trimfit.pipelines.quantize_config import QuantizeConfig as QuantizeConfig
from trimfit.pipelines.quantize_records import QuantizedRecord as QuantizedRecord
from trimfit.pipelines.quantize_records import QuantizeReport as QuantizeReport
from trimfit.pipelines.records import LayerError as LayerError
from trimfit.pipelines.records import LayerRecord as LayerRecord
from trimfit.pipelines.records import PruneReport as PruneReport
from trimfit.pipelines.score import score_checkpoint as score_checkpoint
