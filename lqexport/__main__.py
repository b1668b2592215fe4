"""`python -m lqexport` is `lqexport`."""

from lqexport.cli import main

main()
