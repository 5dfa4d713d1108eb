"""The loops that join the rooms: `pruning`, `quantizing`, and `comparing` many prunings.

`runs` keeps what is finished on the disk, `planning` tells beforehand what a run will take. Modules beside these
folders are what several of them need, and `resume`, which goes on with a run of either kind.
"""

from trimfit.pipelines.comparing.compare import compare as compare
from trimfit.pipelines.comparing.comparison import Comparison as Comparison
from trimfit.pipelines.comparing.config import CompareConfig as CompareConfig
from trimfit.pipelines.observer import Finished as Finished
from trimfit.pipelines.observer import Observer as Observer
from trimfit.pipelines.opened import save_pruned as save_pruned
from trimfit.pipelines.pruning.checkpoint import prune_checkpoint as prune_checkpoint
from trimfit.pipelines.pruning.checkpoint_record import PruneRecord as PruneRecord
from trimfit.pipelines.pruning.config import PruneConfig as PruneConfig
from trimfit.pipelines.pruning.prune import prune as prune
from trimfit.pipelines.pruning.records import LayerError as LayerError
from trimfit.pipelines.pruning.records import LayerRecord as LayerRecord
from trimfit.pipelines.pruning.records import PruneReport as PruneReport
from trimfit.pipelines.quantizing.checkpoint import quantize_checkpoint as quantize_checkpoint
from trimfit.pipelines.quantizing.config import QuantizeConfig as QuantizeConfig
from trimfit.pipelines.quantizing.quantize import quantize as quantize
from trimfit.pipelines.quantizing.records import QuantizedRecord as QuantizedRecord
from trimfit.pipelines.quantizing.records import QuantizeReport as QuantizeReport
from trimfit.pipelines.quantizing.save import check_format as check_format
from trimfit.pipelines.resume import resume as resume
