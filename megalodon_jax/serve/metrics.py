"""Counts and times of a server, in the text form of Prometheus."""

from collections.abc import Callable

from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram, generate_latest
from prometheus_client.exposition import CONTENT_TYPE_LATEST

_FIRST_TOKEN_SECONDS = (0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1, 2.5, 5, 10, 30, 60, 300)
_TOKEN_SECONDS = (0.0005, 0.001, 0.0025, 0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1, 5)


class Metrics:
    """The metrics of one server.

    Attributes:
      requests: calls of an endpoint by outcome: "ok", "refused" (400 to 415), "unauthorized",
        "busy" (429), "cancelled" (the client has gone), "error".
      prompt_tokens: tokens of prompts that were admitted.
      generated_tokens: tokens of answers.
      first_token: seconds from a call to its first token.
      between_tokens: seconds between tokens; those of one block share its time.
    """

    content_type = CONTENT_TYPE_LATEST

    def __init__(self) -> None:
        # A registry of its own: several servers in one process do not share counts.
        self._registry = CollectorRegistry()
        self.requests = Counter(
            "megalodon_requests",
            "Calls by endpoint and outcome",
            ["endpoint", "outcome"],
            registry=self._registry,
        )
        self.prompt_tokens = Counter(
            "megalodon_prompt_tokens", "Tokens of prompts", registry=self._registry
        )
        self.generated_tokens = Counter(
            "megalodon_generated_tokens", "Tokens of answers", registry=self._registry
        )
        self.first_token = Histogram(
            "megalodon_time_to_first_token_seconds",
            "Seconds from a call to its first token",
            buckets=_FIRST_TOKEN_SECONDS,
            registry=self._registry,
        )
        self.between_tokens = Histogram(
            "megalodon_time_between_tokens_seconds",
            "Seconds between tokens of an answer",
            buckets=_TOKEN_SECONDS,
            registry=self._registry,
        )

    def add_gauge(self, name: str, description: str, read: Callable[[], float]) -> None:
        """Adds a value that is read when the metrics are."""
        Gauge(f"megalodon_{name}", description, registry=self._registry).set_function(read)

    def text(self) -> bytes:
        """All metrics."""
        return generate_latest(self._registry)
