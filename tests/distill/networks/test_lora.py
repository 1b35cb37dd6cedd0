"""One backbone, several networks: switched off it is the teacher bit for bit, and each adapter moves alone."""

from dataclasses import replace

import pytest
import torch
from diffusers import StableDiffusion3Pipeline, StableDiffusionXLPipeline
from peft import LoraConfig
from safetensors.torch import save_file
from torch import nn
from torch._subclasses import FakeTensorMode

from flashbulb_distill.bundle import Shape
from flashbulb_distill.core.draws import Draws
from flashbulb_distill.errors import MissingFileError, UsageError
from flashbulb_distill.networks.lora import SharedBackbone, checkpoint_blocks, diffusers_names, merge
from flashbulb_distill.pairs.store import Pairs
from flashbulb_distill.teachers.denoiser import Condition
from flashbulb_distill.teachers.load import open_source
from flashbulb_distill.teachers.open import open_teacher
from flashbulb_distill.train.build import Inputs, build, student_of
from flashbulb_distill.train.fake import pull
from flashbulb_distill.train.recipe import Recipe
from support.tiny_pipelines import make_tiny_pipeline

FAMILIES = ("sdxl", "sd35-large", "cogvideox-5b")
SIZES = {"sdxl": (4, 8, 8), "sd35-large": (16, 8, 8), "cogvideox-5b": (16, 3, 8, 8)}


@pytest.fixture(scope="module", params=FAMILIES)
def source(request, tmp_path_factory):
    return request.param, open_source(make_tiny_pipeline(tmp_path_factory.mktemp("t"), request.param))


def case(family, source):
    draws = Draws(0)
    xt = torch.from_numpy(draws.normal("xt", 0, range(2), SIZES[family]))
    return xt, torch.tensor([0.9, 0.4]), source.prompts().encode(["a red dog", ""])


def shake(adapted, seed):
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in adapted.parameters():
            parameter += 0.1 * torch.randn(parameter.shape, generator=generator)


def test_off_is_the_teacher_bitwise_and_an_adapter_changes_only_its_own_network(source):
    family, folder = source
    inputs = case(family, folder)
    with torch.no_grad():
        wanted = folder.denoiser()(*inputs)
        shared = SharedBackbone(folder.denoiser())
        student = shared.adapter("student", rank=2, alpha=2)
        fake = shared.adapter("fake", rank=2, alpha=2)
        assert torch.equal(student(*inputs), wanted), "an adapter begins as nothing"
        shake(student, 1)
        moved = student(*inputs)
        assert not torch.allclose(moved, wanted)
        assert torch.equal(fake(*inputs), wanted)
        assert torch.equal(shared.backbone(*inputs), wanted), "teacher: adapters off"
        again = SharedBackbone(shared.backbone)
        assert torch.equal(again.backbone(*inputs), wanted), "a second stage shares the same backbone"
    assert {id(p) for p in student.parameters()}.isdisjoint(id(p) for p in fake.parameters())
    assert not any(p.requires_grad for p in shared.backbone.parameters())


def test_merged_and_loaded_by_diffusers_it_is_the_same_network(source, tmp_path):
    family, folder = source
    inputs = case(family, folder)
    student = SharedBackbone(folder.denoiser()).adapter("student", rank=2, alpha=1)
    shake(student, 2)
    values = {name: p.detach() for name, p in student.named_parameters()}
    merged = folder.denoiser()
    merge(merged, values, rank=2, alpha=1)
    save_file(diffusers_names(values, rank=2, alpha=1), tmp_path / "pytorch_lora_weights.safetensors")
    from diffusers import DiffusionPipeline

    pipeline = DiffusionPipeline.from_pretrained(folder.folder)
    pipeline.load_lora_weights(tmp_path)
    by_diffusers = folder.denoiser()
    name = "unet" if family == "sdxl" else "transformer"
    setattr(by_diffusers, name, getattr(pipeline, name))
    with torch.no_grad():
        wanted = student(*inputs)
        torch.testing.assert_close(merged(*inputs), wanted, atol=1e-5, rtol=1e-4)
        torch.testing.assert_close(by_diffusers(*inputs), wanted, atol=1e-5, rtol=1e-4)


def test_an_adapter_from_a_file_is_merged_into_a_network_on_a_gpu():
    with FakeTensorMode():  # knows of devices that are not here
        layer = nn.Linear(4, 4, device="meta")
        layer.weight = nn.Parameter(torch.empty(4, 4, device="cuda"))
        values = {"factors.0/lora_A/weight": torch.ones(2, 4), "factors.0/lora_B/weight": torch.ones(4, 2)}
        merge(nn.Sequential(layer), values, rank=2, alpha=2)
        assert layer.weight.device.type == "cuda"


def test_a_target_that_names_no_last_part_finds_the_same_layers_in_every_stage(source):
    """The second stage wrapped the wrapped layers: merging its student found no weight in `to_q.base`'s parent."""
    _, folder = source
    denoiser = folder.denoiser()
    first, second = (SharedBackbone(denoiser, targets="attn") for _ in range(2))
    assert second.layers == first.layers
    student = second.adapter("student", rank=2, alpha=2)
    merge(folder.denoiser(), {name: p.detach() for name, p in student.named_parameters()}, rank=2, alpha=2)


def test_recomputed_blocks_give_the_same_gradients_whichever_adapter_is_on_by_then(source):
    family, folder = source
    inputs = case(family, folder)
    gradients = []
    for recompute in (False, True):
        torch.manual_seed(5)
        shared = SharedBackbone(folder.denoiser())
        student = shared.adapter("student", rank=2, alpha=2)
        fake = shared.adapter("fake", rank=2, alpha=2)
        shake(student, 3)
        shake(fake, 4)
        if recompute:
            checkpoint_blocks(shared.backbone, shared.switch)
        xt, t, cond = inputs
        out = fake(student(xt, t, cond), t, cond) + shared.backbone(student(xt, t, cond), t, cond)
        parameters = [*student.parameters(), *fake.parameters()]
        gradients.append(torch.autograd.grad(out.square().mean(), parameters))
    for plain, recomputed in zip(*gradients, strict=True):
        torch.testing.assert_close(recomputed, plain, atol=1e-6, rtol=1e-4)
    assert max(float(g.abs().max()) for g in gradients[0]) > 0


def recipe(folder, **fields):
    raw = {
        "name": "tiny",
        "version": 1,
        "family": "sd3",
        "teacher": str(folder),
        "shape": {"width": 64, "height": 64},
        "prompts": "none",
        "seed": 0,
        "time_steps": (1.0, 0.5),
        "adm": {
            "steps": 2,
            "batch_size": 2,
            "taps": (-1, 0),
            "guidance": 2.0,
            "rates": {"student": 1e-3, "heads": 1e-3, "fake": 1e-3},
        },
        "export": {"licence": "Apache-2.0"},
    }
    return Recipe.model_validate(raw | fields)


@pytest.mark.parametrize("checkpointing", [False, True])
def test_adm_trains_adapters_on_one_frozen_backbone(tmp_path, checkpointing):
    folder = make_tiny_pipeline(tmp_path / "teacher", "sd35-large")
    lora = recipe(
        folder,
        roles={"student": "lora", "fake": "lora"},
        lora={"rank": 2, "alpha": 2},
        memory={"checkpointing": checkpointing},
    )
    teacher = open_teacher("sd3", str(folder), shape=Shape(width=64, height=64))
    before = {name: p.clone() for name, p in teacher.denoiser.named_parameters()}
    cond = teacher.encode(["a red dog", "red"])
    method = build("adm", Inputs(lora, teacher, cond, teacher.encode_uncond()))
    assert method.teacher is teacher.denoiser, "no copy"
    logs = [method.step(step) for step in range(2)]
    assert all(log["student_norm"] > 0 for log in logs)
    after = {name.replace(".base.", "."): p for name, p in teacher.denoiser.named_parameters()}
    assert all(torch.equal(after[name], value) for name, value in before.items()), "the backbone is frozen"
    moved = {name: p.detach() for name, p in method.student.named_parameters()}
    assert any(p.abs().max() > 0 for name, p in moved.items() if "lora_B" in name)
    assert sum(p.numel() for p in moved.values()) < 0.5 * sum(p.numel() for p in before.values())
    fresh = open_teacher("sd3", str(folder), shape=Shape(width=64, height=64))
    student = student_of(fresh, moved, lora)
    xt, t = torch.randn(2, 16, 8, 8), torch.tensor([1.0, 0.5])
    with torch.no_grad():
        torch.testing.assert_close(student(xt, t, cond), method.student(xt, t, cond), atol=1e-5, rtol=1e-4)


def weights_of(adapted):
    values = dict(adapted.named_parameters())
    down = [name for name in values if "lora_A" in name]
    return torch.cat([(values[name.replace("lora_A", "lora_B")] @ values[name]).flatten() for name in down])


@pytest.mark.parametrize("stage", ["adm", "dmd", "lcm"])
def test_an_adapter_that_follows_another_moves_by_its_share_of_the_weights(stage, tmp_path):
    """Each had drawn an A of its own: a share of .03 of the factors was .0004 of the student's weights."""
    folder = make_tiny_pipeline(tmp_path / "teacher", "sd35-large")
    rates = {"student": 1e-3, "heads": 1e-3, "fake": 1e-3}
    common = {"steps": 2, "batch_size": 2, "guidance": 2.0}
    sections = {
        "adm": {"rates": rates, "taps": (-1, 0), "ida": 0.03},
        "dmd": {"rates": rates, "ida": 0.03},
        "lcm": {"rate": 1e-3, "target_ema": 0.97},
    }
    shared = recipe(
        folder,
        roles={"student": "lora", "fake": "lora"},
        lora={"rank": 2, "alpha": 2},
        pairs={"count": 2, "num_steps": 2, "guidance": 2.0},
        **({"adm": None} | {stage: common | sections[stage]}),
    )
    teacher = open_teacher("sd3", str(folder), shape=Shape(width=64, height=64))
    cond = teacher.encode(["red", "dog"])
    latents = torch.randn(2, 16, 8, 8)
    pairs = Pairs(latents, latents, torch.arange(2), ("red", "dog"))
    method = build(stage, Inputs(shared, teacher, cond, teacher.encode_uncond(), pairs))
    follower = method.target if stage == "lcm" else method.fake
    assert weights_of(follower).abs().max() == 0, "it begins as the teacher"
    with torch.no_grad():
        for seed, network in enumerate((follower, method.student)):
            generator = torch.Generator().manual_seed(seed)
            for name, parameter in network.named_parameters():
                if "lora_B" in name:
                    parameter.normal_(std=0.1, generator=generator)
        wanted = 0.97 * weights_of(follower) + 0.03 * weights_of(method.student)
        pull(follower, method.student, 0.03)
        torch.testing.assert_close(weights_of(follower), wanted, atol=1e-6, rtol=1e-4)


@pytest.mark.parametrize("family", ["sdxl", "sd35-large"])
def test_a_teachers_own_loras_are_merged_as_diffusers_does(family, tmp_path):
    folder = make_tiny_pipeline(tmp_path / "teacher", family)
    kind = StableDiffusionXLPipeline if family == "sdxl" else StableDiffusion3Pipeline
    pipeline = kind.from_pretrained(folder)
    network = pipeline.unet if family == "sdxl" else pipeline.transformer
    network.add_adapter(
        LoraConfig(r=2, lora_alpha=4, target_modules=["to_q", "to_v"], init_lora_weights=False)
    )
    network.save_lora_adapter(tmp_path / "lora", weight_name="mine.safetensors")
    state = network.state_dict()
    assert any("lora" in name for name in state)
    key = "unet" if family == "sdxl" else "transformer"
    from peft import get_peft_model_state_dict

    layers = {f"{key}.{name}": value for name, value in get_peft_model_state_dict(network).items()}
    kind.save_lora_weights(tmp_path / "lora", **{f"{key}_lora_layers": layers_of(layers, key)})
    file = tmp_path / "lora" / "pytorch_lora_weights.safetensors"

    shape = Shape(width=64, height=64)
    plain = open_teacher(open_source(folder).family, str(folder), shape=shape)
    tuned = open_teacher(open_source(folder).family, str(folder), shape=shape, loras=[str(file)])
    cond: Condition = plain.encode(["a red dog", ""])
    xt, t = torch.randn(2, *SIZES[family]), torch.tensor([0.9, 0.3])
    reference = kind.from_pretrained(folder)
    reference.load_lora_weights(file.parent, weight_name=file.name)
    reference.fuse_lora()
    wanted = open_source(folder).denoiser()
    setattr(wanted, key, getattr(reference, key))
    with torch.no_grad():
        torch.testing.assert_close(tuned.denoiser(xt, t, cond), wanted(xt, t, cond), atol=1e-6, rtol=1e-5)
        assert not torch.allclose(tuned.denoiser(xt, t, cond), plain.denoiser(xt, t, cond))
    assert tuned.sha256() != plain.sha256()
    missing = open_teacher(open_source(folder).family, str(folder), shape=shape, loras=["none"])
    with pytest.raises(MissingFileError, match="loras: expected a safetensors file"):
        missing.new_denoiser(bf16=False)


@pytest.mark.parametrize(
    ("family", "network", "text"),
    [("sdxl", "unet", "text_encoder_2"), ("sd3", "transformer", "text_encoder")],
)
def test_a_lora_that_tunes_a_text_encoder_too_is_refused_with_the_keys_name(family, network, text, tmp_path):
    """The text encoders' part was left out without a word: the teacher was not base + LoRA."""
    source = open_source(make_tiny_pipeline(tmp_path / "teacher", family))
    parts = {
        network: (source.denoiser().network, "to_q"),
        text: (source.prompts().clip_g if text.endswith("2") else source.prompts().clip_l, "q_proj"),
    }
    state = {}
    for prefix, (part, last) in parts.items():
        name, layer = next((name, layer) for name, layer in part.named_modules() if name.endswith(last))
        state[f"{prefix}.{name}.lora_A.weight"] = torch.ones(2, layer.in_features)
        state[f"{prefix}.{name}.lora_B.weight"] = torch.ones(layer.out_features, 2)
    save_file(state, tmp_path / "both.safetensors")
    with pytest.raises(UsageError, match=rf"has {text}\..*lora_[AB].* name that folder as teacher"):
        replace(source, loras=(tmp_path / "both.safetensors",)).denoiser()
    save_file({k: v for k, v in state.items() if network in k}, tmp_path / "network.safetensors")
    replace(source, loras=(tmp_path / "network.safetensors",)).denoiser()


def layers_of(layers, key):
    return {name.removeprefix(f"{key}."): value for name, value in layers.items()}


def test_what_does_not_fit_is_refused(tmp_path):
    folder = make_tiny_pipeline(tmp_path / "teacher", "sd3")
    with pytest.raises(UsageError, match=r"lora\.targets: expected the name of a linear layer"):
        SharedBackbone(open_source(folder).denoiser(), targets="nothing")
    eight_bit = recipe(folder, memory={"optimizer": "adamw8bit"})
    teacher = open_teacher("sd3", str(folder), shape=Shape(width=64, height=64))
    cond = teacher.encode(["red"])
    with pytest.raises(UsageError, match=r"memory\.optimizer: expected bitsandbytes"):
        build("adm", Inputs(eight_bit, teacher, cond, cond))
    with pytest.raises(ValueError, match="ida: expected student and fake score of one kind"):
        recipe(folder, roles={"student": "lora"}, adm=recipe(folder).adm.model_dump() | {"ida": 0.03})
