"""Resumed runs that differ from the original."""

from __future__ import annotations

from tests.faults.mutation import Mutant
from tests.museum.exhibit import Exhibit, Source, proof_of

_KILLS = ("tests/faults/test_kill_anywhere.py::test_three_kills_lose_and_repeat_nothing",)
_RESUME = (
    "tests/pretrain/checkpointing/test_resume.py"
    "::test_a_killed_run_continues_with_the_losses_of_an_undisturbed_one"
)
_LAYOUTS = "tests/pretrain/layouts/test_layouts.py::test_a_run_goes_on_at_another_layout"

RESUMING = {
    "data begin again at the second resume": Exhibit(
        Source(
            "pytorch/torchtitan",
            3907,
            "after a resume the loader saved a position that no longer moved, and the next resume "
            "read from the beginning",
        ),
        Mutant(
            "data_tools.loading.loader:TrainLoader.load_state_dict",
            "self._seek(saved.consumed_samples, saved.plan_mix(self._curriculum.mix_schedule()))",
            "self._seek(saved.consumed_samples, saved.plan_mix(self._curriculum.mix_schedule()))\n"
            "stale = self.state_dict()\n"
            "self.state_dict = lambda: stale",
            _KILLS,
        ),
        proof_of("llama/demo"),
    ),
    "an epoch is shuffled anew in its middle": Exhibit(
        Source(
            "huggingface/accelerate",
            2823,
            "a run resumed inside an epoch went on in the order of the next epoch",
        ),
        Mutant(
            "data_tools.loading.loader:TrainLoader.load_state_dict",
            "self._curriculum = curriculum or self._curriculum",
            "self._curriculum = curriculum or self._curriculum\n"
            "for dataset in self._datasets.values(): dataset._seed += 1",
            (f"{_RESUME}[ZeRO-1]",),
        ),
        proof_of("llama/demo"),
    ),
    "moments begin again at zero": Exhibit(
        Source(
            "KempnerInstitute/KempnerForge",
            114,
            "the moments of AdamW were not restored, while weights, data and rate were",
        ),
        Mutant(
            "pretrain.engine.optimizer_state:restore_optimizer_state",
            "(MASTER, *MOMENTS)",
            "(MASTER,)",
            (f"{_RESUME}[ZeRO-1]",),
        ),
        proof_of("llama/demo"),
    ),
    "steps are counted anew": Exhibit(
        Source(
            "deepspeedai/DeepSpeed",
            4396,
            "ZeRO did not save the step count of the optimizer, and its bias correction began "
            "again",
        ),
        Mutant(
            "pretrain.engine.optimizer_state:_init_states",
            "live.init_state(flat, step)",
            "live.init_state(flat, 0)",
            (f"{_RESUME}[ZeRO-1]",),
        ),
        proof_of("llama/demo"),
    ),
    "moments are off by the alignment of partitions": Exhibit(
        Source(
            "deepspeedai/DeepSpeed",
            5105,
            "optimizer states were restored at another number of data ranks without the padding "
            "that aligns partitions",
        ),
        Mutant(
            "pretrain.engine.optimizer_state:restore_optimizer_state",
            "fragment.location.weight.copy_(fragment.location.master)",
            "fragment.location.weight.copy_(fragment.location.master)\n"
            "for moment in (live.value(fragment, key) for key in MOMENTS):\n"
            "    moment.copy_(moment.roll(min(fragment.location.start, 1)))",
            (f"{_LAYOUTS}[llama fp32 ZeRO-3 DP2 to ZeRO-1 DP2]",),
        ),
        proof_of("llama/demo"),
    ),
    "the rate warms up again": Exhibit(
        Source(
            "lightly-ai/lightly-train",
            301,
            "the progress of the schedule was not saved, and a resumed run began it again",
        ),
        Mutant(
            "pretrain.loop:TrainLoop._steps",
            "learning_rate(step, training, total_steps=total)",
            "learning_rate(step - first + 1, training, total_steps=total)",
            (f"{_RESUME}[ZeRO-1]",),
        ),
        proof_of("llama/demo"),
    ),
}
