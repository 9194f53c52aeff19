"""One rank of a run: from a frozen configuration to a finished, failed or preempted run directory."""

from __future__ import annotations

import faulthandler
import json
import os
import random
import shutil
import sys
import threading
import traceback
from contextlib import suppress
from pathlib import Path
from typing import Any

import numpy as np
import torch

from rlhf_cli import standins, state
from rlhf_cli.config import build, load_config
from rlhf_cli.engine.comm import Comm, seed_all, start
from rlhf_cli.engine.memory import keep_freed_memory, out_of_memory
from rlhf_cli.errors import ConfigError, GateError
from rlhf_cli.exits import DONE, GATE, STOPPED, WRONG_INPUT
from rlhf_cli.launch.stop import Stop
from rlhf_cli.loop import train
from rlhf_cli.plan import HEADS
from rlhf_cli.probe import check_invariance
from rlhf_cli.record import checkpoint
from rlhf_cli.record.files import full_disk
from rlhf_cli.record.heartbeat import Heartbeat
from rlhf_cli.record.output import Both, logged
from rlhf_cli.record.progress import Progress
from rlhf_cli.record.provenance import provenance
from rlhf_cli.record.recorder import make_recorder
from rlhf_cli.record.redact import hide_secrets
from rlhf_cli.record.rundir import RunDir
from rlhf_cli.report import evaluate, summary
from rlhf_cli.rollout.builtin import decoding_of
from rlhf_cli.types import Run
from rlhf_cli.wiring import Parts, make_run

SAMPLES_PER_STEP = 8


class Session:
    """A training run on this rank: builds it, resumes it, saves it, evaluates it."""

    def __init__(self, rundir: RunDir, comm: Comm, stop: Stop, beat: Heartbeat, output: Both | None) -> None:
        cfg = self.cfg = load_config(rundir.path)
        self.rundir, self.comm, self.stop = rundir, comm, stop
        self.lead = comm.rank == 0
        trackers, progress = {}, None
        if output is not None:
            trackers = {
                k: build(v, f"tracker.{k}", allow=cfg.allow_targets) for k, v in (cfg.tracker or {}).items() if v
            }
            progress = Progress(rundir.path.name, cfg.steps, output.terminal, output.log)
            output.show = progress.line
        self.record: Any = make_recorder(rundir, trackers, progress, beat, comm.rank, SAMPLES_PER_STEP)
        stop.told = self._say_stop
        self.run: Run
        self.parts: Parts

    def work(self) -> str:
        """Build, resume, train, evaluate, export. Returns how it ended: finished or preempted."""
        cfg = self.cfg
        with self.record.phase("load"):
            self.run, self.parts = make_run(cfg, self.comm, self.record, self.rundir.path)
            if hasattr(self.parts.sampler, "note"):
                self.parts.sampler.note = self.record.note
            at = self._resume()
        if self._asked() or not self._prepare(at):
            return "preempted"
        self.run.start, self.run.after = at, self._after
        if self.lead and at == 0:
            self.rundir.write_json("provenance.json", self._provenance())
        if cfg.gates.enabled and at == 0:
            self._check_start()
        if at == 0:
            self._evaluate(0)
        if self._asked():
            return "preempted"
        try:
            train(self.run)
        except GateError as e:
            raise e if str(e).startswith(("step ", "rank ")) else GateError(f"step {self._at}: {e}") from None
        if self.stop.signal and self._at < cfg.steps:
            return "preempted"
        self._export()
        return "finished"

    def _prepare(self, at: int) -> bool:
        """Say what stands in; draw responses of the initial policy, where a stage compares with them; False where a signal asked to stop."""
        for note in standins.notes(self.cfg) if at == 0 else ():
            self.record.note(note)
        if self.parts.prepass is None:
            return True
        with self.record.phase("prepass"):
            return self.parts.prepass.run(at, self._asked, self.record.note)

    # -- between steps -------------------------------------------------------------------------------------------------

    _at = 0

    def _after(self, done: int) -> bool:
        """After `done` steps: evaluate, checkpoint, and whether to stop."""
        cfg = self.cfg
        self._at = done
        asked = self._asked()
        last = done == cfg.steps
        if last or (cfg.eval.every and done % cfg.eval.every == 0 and not asked):
            self._evaluate(done)
        if last or asked or (cfg.checkpoint.every and done % cfg.checkpoint.every == 0):
            with self.record.phase("checkpoint"):
                self._save(done)
        return asked and not last

    def _asked(self) -> bool:
        """Whether a signal asked any rank to stop."""
        self.record.heartbeat.beat()
        asked = self.comm.any(bool(self.stop.signal))
        if asked and not self.stop.signal:
            self.stop.signal = "another rank's signal"
        return asked

    def _say_stop(self, name: str) -> None:
        """From a thread: a signal handler may have interrupted the very write that it would make."""
        text = f"{name}: stopping after this step, with a checkpoint; Ctrl-C again stops at once"
        threading.Thread(target=self.record.note, args=(text,), daemon=True).start()

    def _save(self, step: int) -> None:
        aside = self.comm.broadcast(str(checkpoint.begin(self.rundir.checkpoints, step)) if self.lead else None)
        try:
            self._write(Path(aside), step)
        except BaseException:
            if self.lead:  # what is half written would keep a full disk full
                shutil.rmtree(aside, ignore_errors=True)
            raise

    def _write(self, aside: Path, step: int) -> None:
        engines = {name: engine.save(aside) for name, engine in self.parts.engines.items()}
        remembered = state.save(self.parts.state, aside, self.comm)
        rng = {
            "python": random.getstate(),
            "numpy": list(np.random.get_state()),
            "torch": torch.get_rng_state().tolist(),
        }
        rng["numpy"][1] = rng["numpy"][1].tolist()
        (aside / f"rng-rank-{self.comm.rank}.json").write_text(json.dumps(rng))
        if self.lead:
            written = {
                "step": step,
                "world": self.comm.world,
                "packing": self.parts.heads[0].packing,
                "engines": engines,
                "state": remembered,
                "record": self.record.state(),
            }
            (aside / "state.json").write_text(json.dumps(written))
        self.comm.barrier()
        if self.lead:
            checkpoint.commit(aside, step, self.cfg.checkpoint.keep)
            self._begun()
        self.comm.barrier()

    def _resume(self) -> int:
        """Load the newest valid checkpoint, and say which. Returns the step to go on from."""
        found, notes = self.comm.broadcast(self._find() if self.lead else None)
        for note in notes:
            self.record.note(note)
        if found is None:
            self.record.start(self._plain_config(), None)
            return 0
        folder = Path(found)
        saved = json.loads((folder / "state.json").read_text())
        for name, engine in self.parts.engines.items():
            engine.load(folder, saved["engines"][name])
        state.load(self.parts.state, folder, saved["state"])
        self._set_packing(saved["packing"])
        self.run.source.publish(saved["state"]["source"].get("version", saved["step"]))
        self._restore_rng(folder)
        self.record.start(self._plain_config(), saved["record"])
        self.record.note(f"resumed from {folder.name}: {saved['step']} of {self.cfg.steps} steps done")
        if saved["world"] != self.comm.world:
            self.record.note(
                f"the checkpoint was written by {saved['world']} process(es) and is continued by {self.comm.world}; states were re-sharded"
            )
        self._at = int(saved["step"])
        return self._at

    def _find(self) -> tuple[str | None, list[str]]:
        """Where to begin. What was asked for counts once: a later start goes on with the line that this one begins."""
        own = self.rundir.checkpoints
        path, notes = checkpoint.starting_point(own, self.cfg.resume)
        if path is None or checkpoint.is_in(path, own):  # another run's is needed again until there is one of this run
            self._begun()
        return (str(path) if path else None), notes

    def _begun(self) -> None:
        if self.cfg.resume != "auto":
            self.cfg.resume = "auto"
            self.rundir.save_config(self._plain_config())

    def _restore_rng(self, folder: Path) -> None:
        path = folder / f"rng-rank-{self.comm.rank}.json"
        if not path.exists():
            return
        rng = json.loads(path.read_text())
        version, words, gauss = rng["python"]
        random.setstate((version, tuple(words), gauss))
        np.random.set_state((rng["numpy"][0], np.array(rng["numpy"][1], dtype=np.uint32), *rng["numpy"][2:]))
        torch.set_rng_state(torch.tensor(rng["torch"], dtype=torch.uint8))

    # -- evaluation and the end ----------------------------------------------------------------------------------------

    def _evaluate(self, step: int) -> None:
        p, cfg = self.parts, self.cfg
        with self.record.phase("evaluate"):
            if p.sampler is not None and p.eval_scorer is not None and p.heldout:
                rows = evaluate.generate_and_score(
                    p.sampler,
                    p.eval_scorer,
                    p.heldout,
                    p.encoded_heldout,
                    self.comm,
                    decoding_of(cfg, temperature=0.0),
                    k=1,
                    seed=cfg.seed,
                    player=p.player,
                )
                if self.lead:
                    evaluate.write_rows(self.rundir.path / f"heldout-{step:06d}.jsonl", rows)
                self.record.evaluation(step, evaluate.summarise(rows, cfg.eval.bootstrap, cfg.eval.diversity))
            if p.recorded_heldout is not None:
                exp = self.run.annotate(p.recorded_heldout.experience(range(len(p.heldout))))
                for name, update in self.run.updates.items():
                    row = p.engines[name].evaluate(exp, update)
                    self.record.evaluation(step, {f"{name}/{k}": v for k, v in row.items()})

    def _check_start(self) -> None:
        """The gate that compares packed and plain forwards of every learner, on real prompts."""
        for name, head in self.parts.plan.learners.items():
            for want in (c for c in HEADS[head] if c != "entropy"):
                limit = self.cfg.gates.invariance or self.parts.gates.tolerance
                gap = self._invariance(name, want, limit)
                self.record.note(
                    f"gate: {name}: {want} of rows in a batch and of the same rows alone differ by {gap:.1e} (allowed {limit:.1e})"
                )

    def _invariance(self, name: str, want: str, limit: float) -> float:
        """The gap of one learner; where packing is to blame, every model goes on without it, and a note says so."""
        exp = self.parts.probe()
        try:
            return check_invariance(self.parts.engines[name], exp, want, limit)
        except GateError as e:
            if not self.parts.heads[0].packing:
                raise
            self.record.note(f"packing is turned off: {e}")
            self._set_packing(False)
            return check_invariance(self.parts.engines[name], exp, want, limit)

    def _set_packing(self, on: bool) -> None:
        for part in self.parts.heads:
            part.packing = on

    def _export(self) -> None:
        from rlhf_cli.models.export import export

        if not self.cfg.checkpoint.export:
            return
        names = list(self.parts.engines)
        engine = self.parts.engines["policy" if "policy" in names else names[0]]
        whole: dict[str, Any] | None = None
        if engine.stage == 3:  # a collective: every rank walks, one keeps
            kept = {k for k in engine.module.state_dict() if k.startswith("model.")}  # a value head is not the model's
            walked = ((k, v) for k, v in engine.full_state() if self.lead and k in kept)
            whole = {k.removeprefix("model."): v.to("cpu", copy=True) for k, v in walked}
        if self.lead:
            model: Any = engine.module.model
            dtype = torch.bfloat16 if self.cfg.hardware.precision == "bf16" else torch.float32
            export(
                model,
                self.parts.tokenizer,
                self.rundir.path / "export",
                self.cfg.model.lora.merge_export,
                dtype=dtype,
                state=whole,
            )
        self.comm.barrier()

    def _plain_config(self) -> dict[str, Any]:
        from omegaconf import OmegaConf

        return OmegaConf.to_container(self.cfg, resolve=True)  # type: ignore[return-value]

    def _provenance(self) -> dict[str, Any]:
        from rlhf_cli.data.loading import fingerprint
        from rlhf_cli.models import loading

        cfg = self.cfg
        argv = json.loads(os.environ.get("RLHF_ARGV", "null"))
        return provenance(
            seeds={"seed": cfg.seed}, data=fingerprint(cfg.dataset), model=loading.fingerprint(cfg.model), argv=argv
        )


def main(rundir: RunDir, stop: Stop) -> int:
    """Run one rank to its end; returns the exit status."""
    rank = int(os.environ.get("RANK", "0"))
    if rank == 0 and not rundir.claimed and "RLHF_WRITER" not in os.environ:
        rundir.claim()
    try:
        with logged(rundir.logs / f"rank-{rank}.log", shown=rank == 0) as output:
            faulthandler.enable(sys.stderr)
            return _watched(rundir, stop, rank, output)
    finally:
        faulthandler.disable()


def _watched(rundir: RunDir, stop: Stop, rank: int, output: Both | None) -> int:
    """The work of a rank under its heartbeat; why it fails is written down before the error leaves."""
    cfg = load_config(rundir.path)
    beat = Heartbeat(rundir.path, rank, cfg.hardware.timeout, ranks=int(os.environ.get("WORLD_SIZE", "1"))).start()
    session: Session | None = None
    try:
        session = Session(rundir, join(cfg), stop, beat, output)
        ended = session.work()
    except BaseException as e:
        beat.give_way()
        shown = _plainly(e, rundir.path)
        _failed(rundir, session, shown, rank)
        beat.stop()
        if shown is not e:
            raise shown from e
        raise
    session.record.finish(ended, stop.signal)
    if rank == 0 and ended == "finished":
        print(summary.text(rundir.path), flush=True)
    if rank == 0 and ended == "preempted":
        text = f"stopped by {stop.signal} after {session._at} steps; go on with: rlhf resume {rundir.path}"
        print(text, flush=True)
    return STOPPED if ended == "preempted" else DONE


def _plainly(e: BaseException, run: Path) -> BaseException:
    """What the user can do about a full disk or too little memory, in the place of `e` and with its frames; else `e`."""
    told = full_disk(e, run) or out_of_memory(e)
    if told is None:
        return e
    told.__cause__ = e
    return told.with_traceback(e.__traceback__)


def join(cfg: Any) -> Comm:
    """This process among the ranks that its environment describes, seeded and on its device; again where it joined before."""
    return start(_device(cfg), cfg.hardware.timeout)


def _device(cfg: Any) -> torch.device:
    """This rank's device, ready, with every global generator seeded: a user's reward may draw from any of them."""
    torch.set_num_threads(cfg.hardware.threads or 1)
    keep_freed_memory()
    seed_all(cfg.seed)
    if cfg.hardware.device != "cuda":
        return torch.device("cpu")
    device = torch.device("cuda", int(os.environ.get("LOCAL_RANK", "0")))
    torch.cuda.set_device(device)
    return device


def _failed(rundir: RunDir, session: Session | None, e: BaseException, rank: int) -> None:
    """Write down why, before the error leaves; a disk that takes no more must not hide it."""
    reason = f"{type(e).__name__}: {e}" if not isinstance(e, KeyboardInterrupt) else "interrupted twice"
    text = hide_secrets("".join(traceback.format_exception(e)))
    with suppress(OSError):
        print(text, file=sys.stderr, flush=True)
    with suppress(OSError):
        rundir.error(rank).write_text(text, encoding="utf-8")
    with suppress(OSError):
        if session is not None:
            session.record.finish("failed", reason)
        elif rank == 0:
            rundir.set_status("failed", reason=hide_secrets(reason))


def entry(rundir: RunDir, stop: Stop) -> int:
    """A rank that a launcher started, in its own process: an error that the user can act on leaves as one line and an exit status."""
    try:
        return main(rundir, stop)
    except (ConfigError, GateError) as e:
        print(f"rlhf: error: {' '.join(hide_secrets(str(e)).split())}", file=sys.stderr, flush=True)
        return GATE if isinstance(e, GateError) else WRONG_INPUT


if __name__ == "__main__":
    sys.exit(entry(RunDir(sys.argv[1]), Stop()))
