"""`python -m prairie`."""

from prairie.cli.main import main

main()
