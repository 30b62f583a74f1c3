"""`python -m cerberus_ext.cli`"""

from .main import main

main()
