"""The limits on what a file may lose, unless others are given. `lqexport.verification.limits` checks them."""

from __future__ import annotations

MAX_PERPLEXITY_RATIO = 2.0
"""The perplexity may grow by this factor."""
MAX_OVER_EXPECTED = 3.0
"""A file may lose this many times what its types should cost (`lqexport.verification.expected_loss`)."""
