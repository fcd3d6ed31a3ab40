"""A refiner behind any endpoint that speaks OpenAI's chat protocol, through the official client.

Address and key come from the environment (`OPENAI_BASE_URL`, `OPENAI_API_KEY`). The key is in no
message, log or `repr`, not even where a server's error quotes it.
"""

from __future__ import annotations

import email.utils
import logging
import os
import random
import threading
import time
from collections.abc import Iterator, Mapping, Sequence
from concurrent.futures import FIRST_COMPLETED, Future, ThreadPoolExecutor, wait
from dataclasses import dataclass
from typing import Any, Final
from urllib.parse import urlsplit

from latentmodal.experiments.curation.refining import INSTRUCTION, Outcome, Refusal
from latentmodal.experiments.errors import UserError

log = logging.getLogger(__name__)

GIVE_UP_AFTER: Final = 5
"""Texts in succession that no attempt got an answer for: the endpoint is down, not the text bad."""
_OPENAI: Final = "https://api.openai.com/v1"
_USELESS: Final = (401, 403, 404)
"""Wrong key, no permission, no such model or address: no other text would fare better."""
_LATER: Final = (408, 409, 425, 429)
_MAX_MESSAGE: Final = 200


@dataclass(frozen=True, kw_only=True)
class EndpointConfig:
    """How an endpoint is asked.

    Attributes:
        model: its name there.
        instruction: the system message; the text to mend is the user's.
        temperature: of sampling; None leaves it to the model, some take no other.
        requests_per_minute: at most so many, retries included; None: no limit.
        concurrency: requests at a time.
        timeout: seconds for one request.
        attempts: per text, the first included.
        backoff: seconds before the second attempt, doubled before each further one (at most
            `max_backoff`), less where a random share says so; a server's Retry-After goes first.
        max_backoff: longest wait; a Retry-After beyond `max_retry_after` counts as an outage.
    """

    model: str
    instruction: str = INSTRUCTION
    temperature: float | None = None
    requests_per_minute: float | None = None
    concurrency: int = 4
    timeout: float = 60.0
    attempts: int = 6
    backoff: float = 1.0
    max_backoff: float = 60.0
    max_retry_after: float = 600.0

    def __post_init__(self) -> None:
        for name in ("concurrency", "attempts"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name} is {getattr(self, name)}; it must be at least 1")
        for name in ("timeout", "backoff", "max_backoff", "max_retry_after"):
            if getattr(self, name) <= 0:
                raise ValueError(f"{name} is {getattr(self, name)}; it must be above 0")
        if self.requests_per_minute is not None and self.requests_per_minute <= 0:
            raise ValueError(
                f"requests_per_minute is {self.requests_per_minute}; it must be above 0"
            )

    def build(self) -> EndpointRefiner:
        """A refiner with the address and key of the environment; see there for errors."""
        return EndpointRefiner(self)


class _Outage(Exception):  # noqa: N818 - an outcome of asking, never seen outside this file
    """No attempt got an answer."""


class _Stopped(Exception):  # noqa: N818
    """Asking was called off while waiting."""


class Pace:
    """Lets threads through one at a time, evenly spaced, and holds all of them when told to."""

    def __init__(self, requests_per_minute: float | None) -> None:
        self._interval = 0.0 if requests_per_minute is None else 60.0 / requests_per_minute
        self._next = 0.0
        self._guard = threading.Lock()
        self._stop = threading.Event()

    def wait(self) -> None:
        """Return when it is this thread's turn."""
        while True:
            with self._guard:
                now = time.monotonic()
                if self._next <= now:
                    self._next = now + self._interval
                    if self._stop.is_set():
                        raise _Stopped
                    return
                delay = self._next - now
            self.sleep(delay)

    def hold(self, seconds: float) -> None:
        """Let nobody through for so long."""
        with self._guard:
            self._next = max(self._next, time.monotonic() + seconds)

    def sleep(self, seconds: float) -> None:
        """Sleep, unless stopped."""
        if self._stop.wait(seconds):
            raise _Stopped

    def stop(self) -> None:
        """Wake everyone who waits, and let nobody through any more."""
        self._stop.set()


class EndpointRefiner:
    """Mends texts by asking an endpoint; see `EndpointConfig`.

    Raises:
        UserError: the client is not installed, or the environment names no endpoint, or a key or
            an address that cannot be one.
    """

    def __init__(
        self, config: EndpointConfig, environment: Mapping[str, str] | None = None
    ) -> None:
        environment = os.environ if environment is None else environment
        self.config = config
        self.name = config.model
        self._key = environment.get("OPENAI_API_KEY", "").strip()
        address = environment.get("OPENAI_BASE_URL", "").strip() or None
        _check(self._key, address)
        if not self._key and address is None:
            raise UserError(
                "OPENAI_API_KEY is not set; set it (and OPENAI_BASE_URL for another endpoint than "
                "OpenAI's), or refine with --local MODEL"
            )
        self._openai = _import_client()
        # This file retries by itself: the pace counts every attempt, and long waits are honoured.
        self._client = self._openai.OpenAI(
            api_key=self._key or "none",
            base_url=address or _OPENAI,
            timeout=config.timeout,
            max_retries=0,
        )

    def refine(self, texts: Sequence[tuple[str, str]]) -> Iterator[Outcome]:
        """Outcomes as they arrive; never more than `concurrency` texts are under way."""
        pace = Pace(self.config.requests_per_minute)
        waiting = iter(texts)
        silent = 0
        with ThreadPoolExecutor(self.config.concurrency) as pool:
            try:
                under_way: dict[Future[str | Refusal], str] = {}
                while True:
                    for record_id, text in waiting:
                        under_way[pool.submit(self._ask, text, pace)] = record_id
                        if len(under_way) == self.config.concurrency:
                            break
                    if not under_way:
                        return
                    done, _ = wait(under_way, return_when=FIRST_COMPLETED)
                    for future in done:
                        result, out = _settled(future)
                        silent = silent + 1 if out else 0
                        yield Outcome(under_way.pop(future), result)
                    if silent >= GIVE_UP_AFTER:
                        raise UserError(
                            f"the endpoint answered none of the last {silent} texts "
                            f"({_reason(result)}); go on later with the same command"
                        )
            finally:
                pace.stop()
                pool.shutdown(cancel_futures=True)

    def _ask(self, text: str, pace: Pace) -> str | Refusal:
        """One text, retried.

        Raises:
            UserError: no other text would fare better.
            _Outage: no attempt got an answer.
        """
        error: Exception
        for attempt in range(1, self.config.attempts + 1):
            pace.wait()
            try:
                return _said(self._request(text))
            except self._openai.APIStatusError as status:
                if status.status_code in _USELESS:
                    raise UserError(f"the endpoint refuses: {self._show(status)}") from None
                if status.status_code not in _LATER and status.status_code < 500:
                    return Refusal(self._show(status))
                error = status
                self._heed(status, pace)
            except self._openai.APIConnectionError as connection:  # time-outs too
                error = connection
            except (ValueError, self._openai.OpenAIError):
                return Refusal("the answer is not JSON")
            if attempt < self.config.attempts:
                log.debug("attempt %d: %s", attempt, self._show(error))
                pace.sleep(self._backoff(attempt))
        raise _Outage(f"{self._show(error)} ({self.config.attempts} attempts)")

    def _request(self, text: str) -> Any:
        temperature = self.config.temperature
        return self._client.chat.completions.create(
            model=self.config.model,
            messages=[
                {"role": "system", "content": self.config.instruction},
                {"role": "user", "content": text},
            ],
            **({} if temperature is None else {"temperature": temperature}),
        )

    def _heed(self, status: Any, pace: Pace) -> None:
        """Hold everybody for as long as the server asks."""
        seconds = retry_after(status.response.headers)
        if seconds is None:
            return
        if seconds > self.config.max_retry_after:
            raise _Outage(f"{self._show(status)}; it asks to come back in {seconds:.0f} s")
        pace.hold(seconds)

    def _backoff(self, attempt: int) -> float:
        longest = min(self.config.backoff * 2 ** (attempt - 1), self.config.max_backoff)
        return longest * random.uniform(0.5, 1.0)

    def _show(self, error: Exception) -> str:
        """One line about an error, without the key."""
        cause = f": {error.__cause__}" if error.__cause__ else ""
        line = " ".join(f"{error}{cause}".split())
        if self._key:
            line = line.replace(self._key, "[key]")
        return line if len(line) <= _MAX_MESSAGE else f"{line[:_MAX_MESSAGE]}…"


def _check(key: str, address: str | None) -> None:
    """Raise UserError for what no request could be made of; never saying the key."""
    if not (key.isascii() and key.isprintable()) or " " in key:
        raise UserError("OPENAI_API_KEY holds characters that no key has; set it again")
    if address is None:
        return
    try:
        parts = urlsplit(address)
        sound = parts.scheme in ("http", "https") and bool(parts.hostname) and parts.port != 0
    except ValueError:
        sound = False
    if not sound:
        raise UserError(
            "OPENAI_BASE_URL is no address; give one like https://host/v1 or http://localhost:8000/v1"
        )


def retry_after(headers: Mapping[str, str], now: float | None = None) -> float | None:
    """The seconds a server asks to wait (RFC 9110, 10.2.3: a number, or a date), if it does."""
    value = headers.get("retry-after", "").strip()
    if value.replace(".", "", 1).isdigit():
        return float(value)
    try:
        date = email.utils.parsedate_to_datetime(value).timestamp()
    except ValueError:
        return None
    return max(0.0, date - (time.time() if now is None else now))


def _settled(future: Future[str | Refusal]) -> tuple[str | Refusal, bool]:
    """What a text's request came to, and whether the endpoint was silent."""
    try:
        return future.result(), False
    except _Outage as outage:
        return Refusal(str(outage)), True


def _said(completion: Any) -> str | Refusal:
    """The text in an answer of whatever shape: a server may send anything."""
    try:
        choice = completion.choices[0]
        message = choice.message
        content = message.content
    except (AttributeError, IndexError, KeyError, TypeError):
        return Refusal("the answer has no choices")
    if getattr(message, "refusal", None):
        return Refusal("the model declined to answer")
    if choice.finish_reason in ("length", "content_filter"):
        return Refusal(f"the answer was cut ({choice.finish_reason})")
    return content if isinstance(content, str) else Refusal("the answer is no text")


def _reason(result: str | Refusal) -> str:
    return result.reason if isinstance(result, Refusal) else ""


def _import_client() -> Any:
    try:
        import openai
    except ImportError:
        raise UserError(
            "refining through an endpoint needs the package openai: pip install openai"
        ) from None
    for chatty in ("openai", "httpx", "httpx2", "httpcore", "httpcore2"):
        # In debug mode they would log whole requests.
        logging.getLogger(chatty).setLevel(logging.WARNING)
    return openai
