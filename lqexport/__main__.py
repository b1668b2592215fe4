"""`python -m lqexport` is `lqexport`."""

from lqexport.cli.app import main

main()
