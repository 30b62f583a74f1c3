"""`cerberus serve`: an HTTP server with the interface of OpenAI's."""
