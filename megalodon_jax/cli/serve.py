"""`megalodon serve`: answers requests over HTTP."""

import contextlib
from dataclasses import dataclass
from pathlib import PurePosixPath
from typing import TYPE_CHECKING

from megalodon_jax.cli.command import WithCompilationCache
from megalodon_jax.cli.options import DecodingOptions, ModelOptions
from megalodon_jax.cli.progress import Progress
from megalodon_jax.errors import ConfigError
from megalodon_jax.serve.settings import ServerSettings

if TYPE_CHECKING:
    from megalodon_jax.inference.engine import Engine
    from megalodon_jax.serve.server import Server


@dataclass(frozen=True, kw_only=True)
class Serve(DecodingOptions, ModelOptions, WithCompilationCache, ServerSettings):
    """Serves a trained model over HTTP, with the endpoints of OpenAI's API and a page to try it.

    Example: megalodon serve runs/first --port 8000
    """

    skip_warm_up: bool = False
    """Serves without compiling all programs before: first requests are slow."""

    def run(self) -> int:
        """Serves until SIGTERM or Ctrl-C."""
        # Errors of the settings come before the model is loaded.
        self.api_keys()
        from megalodon_jax.data.chat_template import ChatTemplate

        if self.chat_template:
            ChatTemplate.load(self.chat_template)
        name = self.model_name or PurePosixPath(self.run_dir.rstrip("/")).name or "model"
        with Progress() as progress, self.keep_programs():
            progress.show("starting")
            server = self._server(name, progress)
            progress.clear()
            print(f"{name} at {server.address}", flush=True)
            return server.run()

    def _server(self, name: str, progress: Progress) -> "Server":
        try:
            from megalodon_jax.serve.server import Server, bind
        except ImportError as error:
            raise ConfigError(
                f"serve needs more packages ({error.name} is missing): pip install "
                "'megalodon-flax[serve]'"
            ) from error
        listener = bind(self)
        with contextlib.ExitStack() as on_error:
            on_error.callback(listener.close)
            engine = self._engine(progress)
            server = Server(engine, self, model_name=name, listener=listener)
            on_error.pop_all()
            return server

    def _engine(self, progress: Progress) -> "Engine":
        from megalodon_jax.serve.server import make_engine

        model, tokenizer = self.load(progress)
        engine = make_engine(model, tokenizer, self, **self.formats(model))
        if not self.skip_warm_up:
            progress.show("compiling")
            engine.warm_up(on_compiled=lambda count: progress.show(f"compiling: {count} programs"))
        return engine
