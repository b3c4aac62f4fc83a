"""Controllers fitted for clients, one at a time, in a thread beside the engine's."""

from __future__ import annotations

import asyncio
import threading
from collections.abc import AsyncGenerator
from contextlib import suppress
from typing import Any

from mlx_lqr.backends.protocol import Recorder
from mlx_lqr.errors import InputError, first_line
from mlx_lqr.loading import able_to_fit
from mlx_lqr.lqr.concept_prompts import framed
from mlx_lqr.lqr.contrast import Contrast
from mlx_lqr.lqr.fit import fit
from mlx_lqr.lqr.sets import review_prompts, review_separation
from mlx_lqr.methods.calibration import recommended
from mlx_lqr.serving.bodies import FitBody
from mlx_lqr.serving.controllers import Controllers, check_id
from mlx_lqr.serving.failures import RequestError, log, unusable

FRAMED = "the sentences were fitted as answers in the model's chat template; chat_prompts: false fits them as they are"
STOPPING = 10.0
"""Seconds to wait for a fit that has been cancelled; it ends at its next report of progress"""


class CancelledError(Exception):
    """Nobody waits for the controller any longer."""


class Fitter:
    """Fits controllers for clients.

    Args:
        model: which they are for.
        controllers: where they are added.
    """

    def __init__(self, model: Recorder, controllers: Controllers) -> None:
        self._model, self._controllers = model, controllers
        self._current: Fit | None = None

    def begin(self, body: FitBody) -> Fit:
        """Begin to fit; `Fit.cancel` has to follow.

        Raises:
            RequestError: another one is being fitted, or no controller can be added under this name.
        """
        if self._current is not None and self._current.running:
            message = "another controller is being fitted: wait for it, or cancel it by leaving"
            raise RequestError(409, message, code="busy")
        self._controllers.check_room(check_id(body.name), body.name, keep=True)
        self._current = Fit(self._model, self._controllers, body)
        return self._current

    def cancel(self) -> None:
        """Cancel what is under way."""
        if self._current is not None:
            self._current.cancel()

    def close(self) -> None:
        """Cancel what is under way and wait for its end."""
        if self._current is not None:
            self._current.cancel()
            self._current.join(STOPPING)


class Fit:
    """A controller that is being fitted in a thread of its own. To be made in the event loop's thread."""

    def __init__(self, model: Recorder, controllers: Controllers, body: FitBody) -> None:
        self._model, self._controllers, self._body = model, controllers, body
        self._cancelled = threading.Event()
        self._ended = False
        self._loop = asyncio.get_running_loop()
        self._events: asyncio.Queue[dict[str, Any] | RequestError] = asyncio.Queue()
        self._thread = threading.Thread(target=self._run, name="mlx-lqr fit", daemon=True)
        self._thread.start()

    @property
    def running(self) -> bool:
        return not self._ended

    async def events(self) -> AsyncGenerator[dict[str, Any], None]:
        """Objects of progress, and last the controller with `notes`.

        Raises:
            RequestError: it cannot be fitted.
        """
        while True:
            event = await self._events.get()
            if isinstance(event, RequestError):
                raise event
            yield event
            if event["object"] == "controller":
                return

    async def whole(self) -> dict[str, Any]:
        """The controller, without the progress."""
        *_, last = [event async for event in self.events()]
        return last

    def cancel(self) -> None:
        """Stop at the next report of progress. One that is finished stays as it is."""
        self._cancelled.set()

    def join(self, seconds: float) -> None:
        self._thread.join(seconds)

    def _run(self) -> None:
        outcome = self._outcome()
        self._ended = True  # before it is told: the client may ask for another one at once
        self._say(outcome)
        self._model.leave_thread()

    def _outcome(self) -> dict[str, Any] | RequestError:
        try:
            return self._fitted()
        except CancelledError:
            log.info("a fit was cancelled")
            return RequestError(503, "the fit was cancelled, since the server is stopping")
        except InputError as error:
            return unusable(error)
        except Exception as error:  # of this fit alone
            log.error("a fit failed: %s: %s", type(error).__name__, first_line(error))
            return RequestError(500, "the fit failed: the server's log says more")

    def _fitted(self) -> dict[str, Any]:
        body, contrasts = self._body, list[Contrast]()
        notes: list[str | None] = [*review_prompts(self._model, body.positive, body.negative)]
        prompts = framed(self._model, (body.positive, body.negative), body.chat_prompts)
        able = able_to_fit(self._model, progress=self._report)
        fitted = fit(able, *prompts, concept=body.name, progress=self._report, on_contrast=contrasts.append)
        notes += [review_separation(contrast, fitted.active_layers) for contrast in contrasts]
        if body.chat_prompts is None and prompts[0] is not body.positive:
            notes.append(FRAMED)
        steering, doubts = recommended(self._model, fitted, "normal", prompts, self._report)
        self._report("Saving", 1, 1)
        loaded = self._controllers.add(body.name, steering, keep=True)
        return {**loaded.entry(), "notes": [note for note in [*notes, *doubts] if note is not None]}

    def _report(self, stage: str, done: int, total: int) -> None:
        if self._cancelled.is_set():
            raise CancelledError
        self._say({"object": "controller.progress", "stage": stage, "done": done, "total": total})

    def _say(self, event: dict[str, Any] | RequestError) -> None:
        with suppress(RuntimeError):  # the loop has ended
            self._loop.call_soon_threadsafe(self._events.put_nowait, event)
