"""Mutants that each remove one defence; the tests of that defence have to fail.

`python -m tests.faults.mutants [NAME ...]` tries mutants in a copy of the tree (mutated_copy.py),
in which a piece of one function is replaced (mutation.py).
"""

from __future__ import annotations

import re
import signal
import sys
import time
from collections.abc import Sequence

from tests.faults.mutated_copy import (
    KILLED,
    LIMIT,
    SURVIVED,
    Copy,
    applied,
    mutated_copy,
    run_tests,
)
from tests.faults.mutation import Mutant

STORE, STORAGE = "pretrain.checkpointing.store", "parallel.checkpoint.storage"
SELECTION, MANIFEST = "pretrain.checkpointing.selection", "parallel.checkpoint.manifest"
ROLLBACKS = "pretrain.checkpointing.rollbacks"
LOOP, SAVES = "pretrain.loop", "pretrain.checkpointing.async_save"
_STORE = "tests/pretrain/checkpointing/test_store.py::test_"
_SELECTION = "tests/pretrain/checkpointing/test_selection.py::test_"
_SAVES = "tests/pretrain/checkpointing/test_async_save.py::test_"
_ROLLBACKS = "tests/pretrain/checkpointing/test_rollbacks.py::test_"
_SPIKES = "tests/pretrain/stability/test_loss_spikes.py::test_"
_FAULTS = "tests/pretrain/checkpointing/test_store_faults.py::test_"
POWER_LOSS = (f"{_FAULTS}a_power_loss_at_any_point_of_a_save_leaves_a_complete_checkpoint",)
KILLED_SAVE = (f"{_FAULTS}a_kill_at_any_point_of_a_save_leaves_a_complete_checkpoint",)
CRASHES = (
    "tests/faults/test_crash_everywhere.py"
    "::test_a_crash_at_any_operation_of_either_rank_leaves_a_complete_checkpoint",
)
KILLS = ("tests/faults/test_kill_anywhere.py::test_three_kills_lose_and_repeat_nothing",)
BIT_FLIPS = (f"{_STORE}every_single_bit_flip_of_a_checkpoint_is_found",)

MUTANTS = {
    "files are flushed": Mutant(
        f"{STORAGE}:Storage.create",
        'self.point("fsync", path); os.fsync(file.fileno())',
        "",
        POWER_LOSS,
    ),
    "folders are flushed": Mutant(
        f"{STORE}:CheckpointStore._publish", "self._storage.sync(directory)", "None", POWER_LOSS
    ),
    "the rename is flushed": Mutant(
        f"{STORAGE}:Storage.sync",
        'self.point("fsync", path)',
        'if path.name == "checkpoints": return\nself.point("fsync", path)',
        POWER_LOSS,
    ),
    "ranks agree that all have written": Mutant(
        f"{STORE}:CheckpointStore.save",
        "failure = self._ranks.first_error(failure)",
        "",
        (f"{_FAULTS}a_write_error_on_one_rank_stops_every_rank_and_publishes_nothing",),
    ),
    "rank 0 waits for the others": Mutant(
        f"{STORE}:CheckpointStore.save",
        "reports = self._ranks.gather(report); failure = self._ranks.first_error(failure)",
        "reports = [report]",
        CRASHES,
    ),
    "a checkpoint gets its name last": Mutant(
        f"{STORE}:CheckpointStore._begin",
        'self.directory / f".tmp-step_{step}-{token}"',
        "target",
        KILLED_SAVE,
    ),
    "old checkpoints go after the new one is there": Mutant(
        f"{STORE}:CheckpointStore._begin",
        "target = self._path(step)",
        "target = self._path(step)\n"
        "for old in steps_in(self.directory): delete(self.directory, old, self._storage)",
        KILLED_SAVE,
    ),
    "a deletion begins with a rename": Mutant(
        "pretrain.checkpointing.directory:delete",
        "storage.remove_tree(set_aside(directory, step, storage))",
        'storage.remove_tree(directory / f"step_{step}")',
        KILLED_SAVE,
    ),
    "a rollback is written down first": Mutant(
        f"{ROLLBACKS}:roll_back",
        "_write(directory, rollbacks, storage)",
        "",
        (f"{_ROLLBACKS}a_kill_at_any_point_of_a_rollback_leaves_the_run_before_or_after_it",),
    ),
    "an interrupted rollback is completed": Mutant(
        f"{ROLLBACKS}:complete_interrupted",
        "rollbacks is None or rollbacks.is_complete",
        "True",
        (f"{_ROLLBACKS}a_kill_while_a_rollback_is_completed_leaves_it_to_the_next_start",),
    ),
    "latest moves before what it names is deleted": Mutant(
        f"{ROLLBACKS}:_complete",
        "point_latest_to(directory, step, storage)",
        "",
        (f"{_ROLLBACKS}a_kill_at_any_point_of_a_rollback_leaves_the_run_before_or_after_it",),
    ),
    "exports pass over what a rollback discarded": Mutant(
        "parallel.checkpoint.newest:_newest",
        "rollbacks is None or rollbacks.is_complete",
        "True",
        (
            f"{_ROLLBACKS}whoever_takes_the_newest_checkpoint_passes_over_those_that_a_rollback"
            "_discarded",
        ),
    ),
    "steps are written anew after a rollback": Mutant(
        f"{STORE}:CheckpointStore.return_to",
        "self._trusted = {each for each in self._trusted if each <= step}",
        "",
        (f"{_ROLLBACKS}steps_after_the_one_returned_to_are_written_anew",),
    ),
    "a rollback leads to before the data around the spike": Mutant(
        "pretrain.stability.rollback:_by_fitness",
        "step < spike.step - skip_before",
        "step < spike.step",
        (f"{_SPIKES}each_of_several_spikes_leaves_no_trace",),
    ),
    "a restarted run still skips": Mutant(
        f"{STORE}:CheckpointStore.find",
        "return found._replace(skipped=skipped)",
        "return found",
        (f"{_SPIKES}a_run_that_is_killed_after_its_rollback_still_skips_the_data",),
    ),
    "retention leaves what a rollback needs": Mutant(
        f"{STORE}:CheckpointStore._retain",
        "self._skip_before",
        "None",
        (f"{_SPIKES}retention_leaves_what_a_rollback_needs",),
    ),
    "contents are hashed": Mutant(
        f"{SELECTION}:_verify",
        "ranks.first_error(verify_content(directory, manifest, mine))",
        "None",
        (
            f"{_SELECTION}a_damaged_newest_checkpoint_is_passed_over_with_one_warning_that_names_the"
            "_file",
        ),
    ),
    "the manifest has a checksum": Mutant(
        f"{MANIFEST}:decode_manifest", "checksum != expected", "False", BIT_FLIPS
    ),
    "sizes are compared": Mutant(
        f"{MANIFEST}:verify_listing",
        "present[name].st_size != entry.size",
        "False",
        (f"{_STORE}command_line_lists_and_verifies",),
    ),
    "surplus files are refused": Mutant(
        f"{MANIFEST}:verify_listing",
        "if surplus: ...",
        "if False: ...",
        (f"{_SELECTION}a_surplus_file_is_found",),
    ),
    "symbolic links are refused": Mutant(
        f"{MANIFEST}:verify_listing",
        "path.is_symlink()",
        "False",
        (f"{_SELECTION}symbolic_links_are_refused_though_their_content_is_right",),
    ),
    "names stay inside a checkpoint": Mutant(
        f"{MANIFEST}:Manifest._stay_inside",
        "_FILE_NAME.fullmatch(name)",
        "True",
        (f"{_STORE}a_manifest_that_names_a_file_outside_is_refused",),
    ),
    "one job for a run directory": Mutant(
        "parallel.checkpoint.lock:RunLock.__init__",
        "fcntl.lockf(self._descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)",
        "None",
        (f"{_STORE}a_second_job_in_the_same_directory_is_refused",),
    ),
    "the lock is looked at before a checkpoint is published": Mutant(
        f"{STORE}:CheckpointStore._check_lock",
        "self._lock.is_held()",
        "True",
        (f"{_STORE}a_job_that_lost_its_lock_publishes_nothing",),
    ),
    "the newest checkpoint comes first": Mutant(
        "pretrain.checkpointing.directory:steps_in",
        "True",
        "False",
        (f"{_SELECTION}the_newest_checkpoint_is_found_with_its_contents",),
    ),
    "no fresh start when all checkpoints are damaged": Mutant(
        f"{SELECTION}:find_checkpoint",
        "if problems: ...",
        "if False: ...",
        (f"{_SELECTION}only_damaged_checkpoints_are_an_error_and_no_fresh_start",),
    ),
    "no fresh start beside a `latest`": Mutant(
        f"{SELECTION}:_candidates",
        "not steps and latest is not None",
        "False",
        (f"{_SELECTION}latest_without_any_checkpoint_is_an_error_and_no_fresh_start",),
    ),
    "another configuration is refused": Mutant(
        f"{SELECTION}:_checked",
        "forbidden_changes(differences)",
        "[]",
        (f"{_SELECTION}another_configuration_is_an_error_with_both_values",),
    ),
    "a save in the background has a copy of its own": Mutant(
        f"{SAVES}:HostBuffers.copy",
        "return buffer.copy_(tensor.detach(), non_blocking=True)",
        "return tensor.detach()",
        (f"{_SAVES}files_are_those_of_a_save_in_the_step_though_steps_change_the_state",),
    ),
    "what fails in the background is raised": Mutant(
        f"{SAVES}:Checkpointer.wait",
        "raise running.error",
        "",
        (f"{_SAVES}a_last_save_that_fails_is_an_error_and_leaves_no_marker",),
    ),
    "the marker waits for the last save": Mutant(
        f"{LOOP}:TrainLoop._steps",
        "self.checkpointer.wait()",
        "None",
        (f"{_SAVES}a_run_that_is_asked_to_stop_publishes_before_it_leaves_its_marker",),
    ),
    "random numbers go on": Mutant(
        f"{LOOP}:TrainLoop.restore",
        "restore_rng_state(checkpoint.rng_path(self.ranks.rank))",
        "None",
        KILLS,
    ),
    "the place in the data goes on": Mutant(
        "pretrain.checkpointing.train_state:TrainState.load_state_dict",
        'self.loader.load_state_dict(state["data"], curriculum=curriculum)',
        "None",
        KILLS,
    ),
    "moments of the optimizer go on": Mutant(
        "pretrain.engine.optimizer_state:restore_optimizer_state",
        "(MASTER, *MOMENTS)",
        "(MASTER,)",
        KILLS,
    ),
    "a rank that stands still ends the run": Mutant(
        "pretrain.supervision.watchdog:Watchdog._check",
        "found is None and waited > limit",
        "False",
        ("tests/pretrain/supervision/test_watchdog.py::test_one_process_alone_is_watched_too",),
    ),
    "every group has a timeout": Mutant(
        "pretrain.distributed.process_groups:limit_groups",
        "distributed_c10d._set_pg_timeout(limit, group)",
        "None",
        (
            "tests/pretrain/supervision/test_watchdog.py"
            "::test_every_group_of_a_run_has_the_timeout_of_the_run",
        ),
    ),
    "replicas are compared": Mutant(
        "pretrain.stability.replica_check:_difference",
        "torch.equal(least, most)",
        "True",
        (
            "tests/pretrain/stability/test_replica_check.py"
            "::test_before_a_save_ranks_are_compared_whatever_the_interval",
        ),
    ),
    "what is not finite is never saved": Mutant(
        "pretrain.stability.nonfinite_steps:check_finite",
        "first_nonfinite_parameter(module)",
        "None",
        (
            "tests/pretrain/stability/test_nonfinite_steps.py"
            "::test_what_is_not_finite_is_never_saved",
        ),
    ),
    "a run that could not save takes no step": Mutant(
        f"{STORE}:CheckpointStore._open",
        'self.directory / f".latest-{os.urandom(4).hex()}"',
        'self.run_dir / "probe"',
        ("tests/faults/test_disk.py::test_a_run_that_could_not_save_takes_no_step",),
    ),
    "a corpus is compared with its checksum": Mutant(
        "data_tools.verify:verify",
        '_compare(f"{dataset.paths.bin}: SHA-256", bin_sha256, info.bin_sha256)',
        "None",
        ("tests/data_tools/test_verify.py::test_verify_finds_every_flipped_bit",),
    ),
    "the description of a corpus has a checksum": Mutant(
        "data_tools.corpus.corpus_info:read_info",
        "_check_undamaged(path, text)",
        "None",
        ("tests/data_tools/test_verify.py::test_edited_sidecar_is_refused_when_it_is_opened",),
    ),
}


def main(names: Sequence[str]) -> int:
    """Try the mutants of these names, or all; 0 when the tests pass without and fail with each."""
    chosen = {name: MUTANTS[name] for name in names or MUTANTS}
    every = sorted({test for mutant in chosen.values() for test in mutant.tests})
    with mutated_copy() as copy:
        if run_tests(copy, every, limit=len(chosen) * LIMIT) != SURVIVED:
            print(f"without a mutant the tests fail:\n{copy.log.read_text()[-3000:]}")
            return 1
        survivors = [name for name, mutant in chosen.items() if not _is_killed(name, mutant, copy)]
    print(f"mutants: {len(chosen) - len(survivors)} of {len(chosen)} killed")
    return min(len(survivors), 1)


def _is_killed(name: str, mutant: Mutant, copy: Copy) -> bool:
    begin = time.monotonic()
    with applied(mutant, copy):
        outcome = run_tests(copy, mutant.tests)
    log = copy.log.read_text()
    if outcome not in (SURVIVED, KILLED, -signal.SIGALRM):
        raise RuntimeError(f"{name}: pytest ended with {outcome}\n{log[-3000:]}")
    failed = re.findall(r"^FAILED (\S+)", log, re.MULTILINE)
    verdict = "survived" if outcome == SURVIVED else "killed"
    by = f" by {failed[0].rpartition('::')[2]}" if failed else ""
    print(f"{verdict}: {name}{by} ({time.monotonic() - begin:.1f} s)", flush=True)
    return outcome != SURVIVED


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
