"""Combiners: how several models are merged, as a stream of task vectors."""

from lightning_merge.combiners._average import Average
from lightning_merge.combiners._base import Combiner
from lightning_merge.combiners._breadcrumbs import Breadcrumbs
from lightning_merge.combiners._combine_files import combine_files
from lightning_merge.combiners._consensus import Consensus
from lightning_merge.combiners._daheim import Daheim
from lightning_merge.combiners._dare import DARE
from lightning_merge.combiners._emr import EMR
from lightning_merge.combiners._ethos import ethos
from lightning_merge.combiners._exponential_average import ExponentialAverage
from lightning_merge.combiners._ext_sub import ext_sub
from lightning_merge.combiners._fisher import Fisher
from lightning_merge.combiners._iso_c import IsoC
from lightning_merge.combiners._magmax import MagMax
from lightning_merge.combiners._mats import MaTS
from lightning_merge.combiners._metagpt import MetaGPT
from lightning_merge.combiners._model_stock import ModelStock
from lightning_merge.combiners._opcm import OPCM
from lightning_merge.combiners._regmean import RegMean
from lightning_merge.combiners._scale import Scale
from lightning_merge.combiners._slerp import SLERP, slerp
from lightning_merge.combiners._sum import Sum
from lightning_merge.combiners._ties import TIES
from lightning_merge.combiners._tsv_m import TSVM
from lightning_merge.combiners._vectors import add_vector, analogy, negate, task_vector

__all__ = [
    "DARE",
    "EMR",
    "OPCM",
    "SLERP",
    "TIES",
    "TSVM",
    "Average",
    "Breadcrumbs",
    "Combiner",
    "Consensus",
    "Daheim",
    "ExponentialAverage",
    "Fisher",
    "IsoC",
    "MaTS",
    "MagMax",
    "MetaGPT",
    "ModelStock",
    "RegMean",
    "Scale",
    "Sum",
    "add_vector",
    "analogy",
    "combine_files",
    "ethos",
    "ext_sub",
    "negate",
    "slerp",
    "task_vector",
]
