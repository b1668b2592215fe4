"""Sources with latent attention whose `kv_b_proj` is cut in two.

llama.cpp attends to latent vectors where `kv_b_proj` is cut in two. Only there does it draft with the blocks of
DeepSeek V3 and GLM-4.7 Flash that predict further tokens.
"""

from __future__ import annotations

from lqexport.converters.models.architecture import CUT, FURTHER_COUNT, Config
from lqexport.converters.models.architectures import architecture_of, find_architecture, normalized
from lqexport.converters.models.further import further_blocks
from lqexport.models.source import HuggingFaceSource, Source


def for_drafts(source: Source) -> Source:
    """Returns the source with `kv_b_proj` cut in two if llama.cpp drafts with one of its blocks only then."""
    if (cut := cut_in_two(source)) is source:
        return source
    drafts = further_blocks(architecture_of(cut.config), cut.config["num_hidden_layers"], cut.names())
    return cut if drafts else source


def of_drafting(config: Config) -> Config:
    """Returns config.json of a model as `for_drafts` would have it, if the model has the blocks that it says."""
    config, architecture = normalized(config), find_architecture(config)
    if architecture is None or not architecture.cuttable or not config.get(FURTHER_COUNT):
        return config
    cut = config | {CUT: True}
    return cut if architecture_of(cut).predictor else config


def cut_in_two(source: Source) -> Source:
    """Returns the source with `kv_b_proj` cut in two, where it is a checkpoint of a `cuttable` architecture."""
    architecture = find_architecture(source.config)
    if not isinstance(source, HuggingFaceSource) or architecture is None or not architecture.cuttable:
        return source
    return HuggingFaceSource(source.folder, source.name, cut=True)
