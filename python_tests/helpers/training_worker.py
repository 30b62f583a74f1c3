"""`cerberus` with chunks of 4 lines, so that a few answers are many chunks. Run as a script, by a launcher."""

from cerberus_ext.cli.main import main
from cerberus_ext.training import hidden_cache, positions

CHUNK_LINES = 4

if __name__ == "__main__":
    positions.CHUNK_LINES = hidden_cache.CHUNK_LINES = CHUNK_LINES
    main()
