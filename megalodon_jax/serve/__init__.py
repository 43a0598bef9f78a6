"""An HTTP server with the endpoints of OpenAI's API, and a page to try it; needs extra `serve`."""
