"""Heads read pictures and videos, every sample for itself, whatever the scale of its features."""

import pytest
import torch

from flashbulb_distill.networks.heads import Head


@pytest.mark.parametrize(("size", "places"), [((8, 6), 12), ((4, 8, 6), 24)])
def test_a_head_gives_one_logit_for_two_places_along_each_axis(size, places):
    torch.manual_seed(0)
    head = Head(5, axes=len(size)).requires_grad_(False)
    features, t = torch.randn(3, 5, *size), torch.tensor([0.1, 0.5, 0.9])
    logits = head(features, t)
    assert logits.shape == (3, places)
    torch.testing.assert_close(head(features[1:2], t[1:2])[0], logits[1], atol=1e-5, rtol=1e-4)
    torch.testing.assert_close(head(features * 1000, t), logits, atol=1e-3, rtol=1e-3)
    assert not torch.allclose(head(features, t.flip(0))[0], logits[0], atol=1e-3), "it is told the time"


def test_a_head_of_videos_sees_the_order_of_the_frames():
    torch.manual_seed(0)
    head, clip, t = Head(5, axes=3).requires_grad_(False), torch.randn(1, 5, 4, 6, 6), torch.tensor([0.5])
    assert not torch.allclose(head(clip, t).mean(), head(clip.flip(2), t).mean(), atol=1e-4)
