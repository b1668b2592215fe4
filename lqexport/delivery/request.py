"""The request for an export, and the checks of everything that can be known before its work."""

from __future__ import annotations

import functools
from dataclasses import dataclass
from pathlib import Path

from lqexport.calibration.texts import read_text
from lqexport.delivery.places import Places
from lqexport.errors import UserError
from lqexport.evaluation import llamacpp, mlx_lm
from lqexport.models.source import open_source
from lqexport.planning.dryrun import Preview, preview
from lqexport.planning.memory import MemoryLimits
from lqexport.recipe import Recipe
from lqexport.storage.files import check_space
from lqexport.verification.default_limits import MAX_OVER_EXPECTED, MAX_PERPLEXITY_RATIO
from lqexport.verification.limits import limits_for
from lqexport.verification.result import Engine
from lqexport.verification.text_share import check_text
from lqexport.verification.verifying import check_options

PROTOCOL = "llama.cpp-512"


@dataclass(frozen=True)
class Measurement:
    """How the written file is measured; the arguments are those of `lqexport.verify`.

    engine   None for llama.cpp or mlx where it is installed and runs the target, else this program's own decoding
    """

    text: str = "python-heldout"
    windows: int | None = None
    engine: Engine | None = None
    max_kl: float | None = None
    max_perplexity_ratio: float | None = MAX_PERPLEXITY_RATIO
    max_over_expected: float | None = MAX_OVER_EXPECTED
    min_cosine: float | None = None

    @property
    def limits(self) -> dict[str, float | None]:
        """Name of a limit -> its value."""
        names = ("max_kl", "max_perplexity_ratio", "max_over_expected", "min_cosine")
        return {name: getattr(self, name) for name in names}


@dataclass(frozen=True)
class Request:
    """An export as it is asked for.

    places          where it writes
    cache           a folder that keeps second moments for other runs; None for none
    memory          the memory to fit into; None for what is free
    keep_artifact   whether the artifact stays when the file is verified
    """

    recipe: Recipe
    places: Places
    measurement: Measurement = Measurement()
    device: str = "auto"
    cache: Path | None = None
    memory: MemoryLimits | None = None
    keep_artifact: bool = False

    @functools.cached_property
    def engine(self) -> Engine:
        """The engine that runs the written file."""
        if self.measurement.engine is not None:
            return self.measurement.engine
        family = self.recipe.parsed_target.family
        if family == "mlx" and mlx_lm.is_installed():
            return "mlx"
        return "llama.cpp" if family == "gguf" and llamacpp.is_installed() else "lqexport"

    def check(self) -> Preview:
        """Returns the plan of the run after checking all that can be known before work; reads no weights.

        Raises UserError as `preview` does, and if the output cannot be written or the file could not be verified.
        """
        target = self.recipe.parsed_target
        self.places.check(target)
        if self.engine == "llama.cpp" and target.family != "gguf":
            raise UserError(f"llama.cpp runs GGUF files, not {target}: leave out --engine, or take --engine lqexport.")
        if self.engine == "mlx" and target.family != "mlx":
            raise UserError(f"mlx-lm runs MLX folders, not {target}: leave out --engine, or take --engine lqexport.")
        check_options(self.places.model, (PROTOCOL,), self.measurement.windows, self.engine)
        shown = preview(self.recipe, self.places.artifact)
        limits_for(self.measurement.limits, shown.config)
        return shown

    def check_room(self, shown: Preview) -> None:
        """Raises UserError if the output's disk is too small for artifact and file together."""
        check_space(self.places.model, shown.missing_bytes + shown.tensor_bytes)

    def check_text(self) -> None:
        """Raises UserError if the evaluation text cannot be read, or is too short for a window.

        A text of the hub is downloaded.
        """
        text, source = read_text(self.measurement.text), open_source(self.recipe.source)
        check_text(text, source, (PROTOCOL,), self.measurement.windows)
