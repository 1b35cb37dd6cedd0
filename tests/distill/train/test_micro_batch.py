"""A batch that is computed in parts has the gradients, and the logs, of the whole batch: in every method."""

import dataclasses

import pytest
import torch

from flashbulb_distill.train.step import Parts
from support.mixture_methods import KINDS, make_method

# Sums are taken in another order, float32. Measured: 1e-6 of the largest value of a role's gradient.
TOLERANCE = 2e-5
# Rows of 16 at once; the pixel discriminator sees 8, so that parts show it all, some and none of theirs.
SIZES = (5, 16, 1)
CASES = {kind: (kind, {}) for kind in KINDS} | {
    "adp, r1": ("adp", {"r1_weight": 0.1}),
    "adm, full jacobian, r1": ("adm", {"r1_weight": 0.1, "jacobian": "full"}),
    "ladd, r1": ("ladd", {"r1_weight": 0.1}),
}


def gradients_of(kind, micro_batch, **settings):
    """Do two steps; return the gradients of every update by role, the logs, and the weights they ended at."""
    method = make_method(kind, clip=1e9, rate=1e-6, **settings)
    steps = {"time_steps": (1.0, 0.5)} if hasattr(method, "time_steps") else {}
    method = dataclasses.replace(method, micro_batch=micro_batch, **steps)
    torch.manual_seed(1)
    for module in method.modules.values():
        for parameter in module.parameters():
            torch.nn.init.normal_(parameter, std=0.3)
    seen = {role: [] for role in method.optimizers}

    def watch(role):
        def keep(optimizer, args, kwargs):
            gradients = [p.grad for group in optimizer.param_groups for p in group["params"]]
            seen[role].append(torch.cat([g.flatten().clone() for g in gradients if g is not None]))

        return keep

    for role, optimizer in method.optimizers.items():
        optimizer.register_step_pre_hook(watch(role))
    logs = [method.step(step) for step in range(2)]
    return seen, logs


@pytest.mark.parametrize("micro_batch", SIZES)
@pytest.mark.parametrize("case", CASES)
def test_a_batch_in_parts_has_the_gradients_of_the_whole_batch(case, micro_batch):
    kind, settings = CASES[case]
    whole, whole_logs = gradients_of(kind, None, **settings)
    parts, logs = gradients_of(kind, micro_batch, **settings)
    assert whole.keys() == parts.keys()
    for role, gradients in whole.items():
        assert len(gradients) == len(parts[role]) >= 2, role
        for one, other in zip(gradients, parts[role], strict=True):
            size = one.abs().max()
            assert size > 0, role
            torch.testing.assert_close(other, one, atol=TOLERANCE * float(size), rtol=0)
    for one, other in zip(whole_logs, logs, strict=True):
        assert one.keys() == other.keys()
        assert other == pytest.approx(one, rel=1e-3, abs=1e-5)


@pytest.mark.parametrize("kind", KINDS)
def test_in_parts_too_the_students_loss_moves_the_student_alone(kind):
    method = dataclasses.replace(make_method(kind), micro_batch=5)
    for role, optimizer in method.optimizers.items():
        if role != "student":
            optimizer.param_groups[0]["lr"] = 0.0
    start = {role: [p.clone() for p in m.parameters()] for role, m in method.modules.items()}
    method.step(0)
    moved = {
        role
        for role, m in method.modules.items()
        if any(not torch.equal(a, b) for a, b in zip(start[role], m.parameters(), strict=True))
    }
    assert moved - {"target"} == {"student"}, "LCM's target follows the student, by no gradient"
    assert all(p.grad is None for m in method.modules.values() for p in m.parameters())


def test_a_part_that_counts_too_much_is_caught(monkeypatch):
    """The planted fault: every part counts the same, though the last one is smaller."""
    whole, _ = gradients_of("regression", None)
    monkeypatch.setattr(Parts, "share", lambda self, part: 1 / len(self.parts))
    parts, _ = gradients_of("regression", 5)
    one, other = whole["student"][0], parts["student"][0]
    assert (one - other).abs().max() > 100 * TOLERANCE * one.abs().max()


def test_parts_are_the_rows_in_order_and_say_who_is_among_the_first():
    parts = Parts(range(1, 20, 2), 4)  # ten rows of the second of two processes
    assert [list(part) for part in parts] == [[1, 3, 5, 7], [9, 11, 13, 15], [17, 19]]
    assert [parts.share(part) for part in parts] == [0.4, 0.4, 0.2]
    assert [parts.within(part, 5) for part in parts] == [4, 1, 0]
    assert not parts.is_whole
    assert Parts(range(3), None).is_whole
