"""What /metrics says, in the form that Prometheus reads."""

from __future__ import annotations

from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram, generate_latest

from .choice import Choice
from .engine import Engine

_SECONDS = (0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1, 2.5, 5, 10, 30, 60)


class Metrics:
    """Of one server."""

    def __init__(self, engine: Engine) -> None:
        registry = self._registry = CollectorRegistry()
        self.requests = Counter("cerberus_requests", "Requests, by how they ended", ["status"], registry=registry)
        self.first = Histogram(
            "cerberus_first_token_seconds", "From a request to its first token", buckets=_SECONDS, registry=registry
        )
        self._tokens = Counter("cerberus_generated_tokens", "Tokens of answers", registry=registry)
        self._prompts = Counter("cerberus_prompt_tokens", "Tokens of prompts", registry=registry)
        self._steps = Counter("cerberus_steps", "Forwards of the model after prompts'", registry=registry)
        self._drafted = Counter("cerberus_drafted_tokens", "Tokens that were drafted", registry=registry)
        self._accepted = Counter("cerberus_accepted_tokens", "Drafted tokens that were right", registry=registry)
        self._seconds = Counter("cerberus_phase_seconds", "Time of the phases of steps", ["phase"], registry=registry)
        Gauge("cerberus_waiting_requests", "Answers that wait for their turn", registry=registry).set_function(
            lambda: engine.waiting
        )
        Gauge("cerberus_running_requests", "Answers that are decoded", registry=registry).set_function(
            lambda: engine.running
        )

    def count(self, choice: Choice) -> None:
        """An answer that has ended, or been given up."""
        self._tokens.inc(choice.tokens)
        self._drafted.inc(choice.drafted)
        self._accepted.inc(choice.accepted)
        if (stats := choice.stats) is not None:
            self._prompts.inc(choice.ids.shape[1])
            self._steps.inc(stats.steps)
            for phase, seconds in stats.seconds.items():
                self._seconds.labels(phase).inc(seconds)

    def text(self) -> bytes:
        return generate_latest(self._registry)
