"""SDXL, SD3, SD3.5 and CogVideoX: every wrapper against diffusers' own pipeline, on tiny models with the real flags."""

import io
import shutil

import pytest
import torch
from diffusers import DDIMScheduler, DiffusionPipeline
from huggingface_hub.utils import filter_repo_objects

from flashbulb_distill.bundle import Shape
from flashbulb_distill.errors import MissingFileError, UsageError
from flashbulb_distill.pairs.generate import sample_teacher
from flashbulb_distill.teachers.codec import VaeCodec
from flashbulb_distill.teachers.cogvideox import CogVideoXDenoiser
from flashbulb_distill.teachers.load import open_source
from flashbulb_distill.teachers.pretrained import PretrainedTeacher
from support.tiny_pipelines import FAMILIES, make_tiny_pipeline, tiny_pipeline

PROMPTS = ["a red dog", "", "red " * 300]  # the last is longer than every encoder reads
SIZE = {"width": 64, "height": 32}  # not square: an exchanged axis shows


@pytest.fixture(scope="module", params=FAMILIES)
def family(request):
    return request.param


@pytest.fixture(scope="module")
def pipeline(family):
    return tiny_pipeline(family)


@pytest.fixture(scope="module")
def source(family, tmp_path_factory):
    return open_source(make_tiny_pipeline(tmp_path_factory.mktemp(family), family))


@pytest.fixture(scope="module")
def denoiser(source):
    return source.denoiser()


@pytest.fixture(scope="module")
def cond(source):
    return source.prompts().encode(PROMPTS)


def noise_like(source, count, seed=0):
    shape = source.codec().latent_shape(**SIZE, frames=9)
    return torch.randn(count, *shape, generator=torch.Generator().manual_seed(seed))


def theirs(pipeline, xt, timesteps, cond):
    """Call diffusers' network as its pipeline does, at the timesteps that the pipeline would give."""
    name = type(pipeline).__name__
    if name == "StableDiffusionXLPipeline":
        size = (SIZE["height"], SIZE["width"])
        width = pipeline.text_encoder_2.config.projection_dim
        ids = pipeline._get_add_time_ids(size, (0, 0), size, torch.float32, width)
        added = {"text_embeds": cond.pooled, "time_ids": ids.repeat(len(xt), 1)}
        return pipeline.unet(xt, timesteps, cond.tokens, added_cond_kwargs=added).sample
    if name == "StableDiffusion3Pipeline":
        return pipeline.transformer(xt, cond.tokens, cond.pooled, timesteps).sample
    rotary = None
    if pipeline.transformer.config.use_rotary_positional_embeddings:
        rotary = pipeline._prepare_rotary_positional_embeddings(
            SIZE["height"], SIZE["width"], xt.shape[2], torch.device("cpu")
        )
    out = pipeline.transformer(xt.transpose(1, 2), cond.tokens, timesteps, image_rotary_emb=rotary).sample
    return out.transpose(1, 2)


@torch.no_grad()
def test_output_is_diffusers_own_bitwise(pipeline, source, denoiser, cond):
    xt = noise_like(source, 3)
    timesteps = torch.tensor([999, 499, 0])
    offset = 0 if source.family == "sd3" else 1
    t = (timesteps.double() + offset) / 1000
    expected = theirs(pipeline, xt, timesteps.float() if offset == 0 else timesteps, cond)
    assert torch.equal(denoiser(xt, t, cond), expected)
    assert expected.std() > 0.1


def test_embeddings_are_the_pipelines_own_bitwise(pipeline, source, cond):
    if source.family == "cogvideox":
        tokens, _ = pipeline.encode_prompt(PROMPTS, do_classifier_free_guidance=False)
        pooled = tokens[:, 0, :0]
    else:
        extra = {"prompt_2": PROMPTS} | ({"prompt_3": PROMPTS} if source.family == "sd3" else {})
        tokens, _, pooled, _ = pipeline.encode_prompt(PROMPTS, **extra, do_classifier_free_guidance=False)
    assert torch.equal(cond.tokens, tokens)
    assert torch.equal(cond.pooled, pooled)
    assert not torch.equal(cond.tokens[0], cond.tokens[1])


def test_no_prompt_is_what_the_pipeline_guides_away_from(pipeline, source):
    uncond = source.prompts().encode_uncond()
    if source.family == "cogvideox":
        _, tokens = pipeline.encode_prompt(["x"], do_classifier_free_guidance=True)
        pooled = tokens[:, 0, :0]
    else:
        extra = {"prompt_2": ["x"]} | ({"prompt_3": ["x"]} if source.family == "sd3" else {})
        _, tokens, _, pooled = pipeline.encode_prompt(["x"], **extra, do_classifier_free_guidance=True)
    assert torch.equal(uncond.tokens, tokens)
    assert torch.equal(uncond.pooled, pooled)


@torch.no_grad()
def test_codec_is_the_vae_with_the_pipelines_scaling(pipeline, source):
    codec, latents = source.codec(), noise_like(source, 1)
    pixels = codec.decode(latents)
    if source.family == "cogvideox":
        torch.testing.assert_close(pixels, pipeline.decode_latents(latents.transpose(1, 2)))
    else:
        config = pipeline.vae.config
        raw = latents / config.scaling_factor + (config.shift_factor or 0)  # as both pipelines do
        torch.testing.assert_close(pixels, pipeline.vae.decode(raw).sample)
    frames = (9,) if source.family == "cogvideox" else ()
    assert pixels.shape == (1, 3, *frames, SIZE["height"], SIZE["width"])
    posterior = pipeline.vae.encode(pixels).latent_dist
    torch.testing.assert_close(codec.encode(pixels) / codec.scaling + codec.shift, posterior.mode())
    sampled = codec.encode(pixels, latents) - codec.encode(pixels)
    torch.testing.assert_close(sampled, posterior.std * latents * codec.scaling, atol=1e-5, rtol=1e-4)


@torch.no_grad()
def test_features_of_the_last_block_give_the_output(pipeline, source, denoiser, cond):
    """The last map, through the network's own output layers by hand."""
    xt, t = noise_like(source, 3), torch.tensor([0.3, 0.7, 1.0])
    last = len(denoiser.blocks) - 1
    maps = denoiser.features(xt, t, cond, range(last + 1))
    assert tuple(m.shape[1] for m in maps) == denoiser.widths
    if source.family == "sdxl":
        unet = pipeline.unet
        arrived = unet.conv_out(unet.conv_act(unet.conv_norm_out(maps[last])))
    else:
        network, tokens = pipeline.transformer, maps[last].flatten(2).transpose(1, 2)
        time = denoiser.timestep(t)
        if source.family == "sd3":
            emb = {"conditioning_embedding": network.time_text_embed(time, cond.pooled)}
        else:
            tokens = network.norm_final(tokens)
            emb = {"temb": network.time_embedding(network.time_proj(time))}
        flat = network.proj_out(network.norm_out(tokens, **emb))
        if source.family == "sd3":  # [b, h w, (p q c)] -> [b, c, h p, w q]
            arrived = flat.unflatten(2, (2, 2, -1)).unflatten(1, (xt.shape[-2] // 2, -1))
            arrived = arrived.permute(0, 5, 1, 3, 2, 4).flatten(4, 5).flatten(2, 3)
        else:  # [b, f h w, (c p q)] -> [b, c, f, h p, w q]
            arrived = flat.unflatten(2, (-1, 2, 2)).unflatten(1, (*xt.shape[2:3], xt.shape[-2] // 2, -1))
            arrived = arrived.permute(0, 4, 1, 2, 5, 3, 6).flatten(5, 6).flatten(3, 4)
    torch.testing.assert_close(denoiser(xt, t, cond), arrived, atol=1e-5, rtol=1e-4)


@torch.no_grad()
def test_a_guided_teacher_draws_what_its_pipeline_draws(pipeline, source, denoiser, cond):
    """Whole loops, ours and diffusers', from the same noise: schedule, time steps, guidance and all."""
    steps, scale = 4, 3.0
    noise = noise_like(source, 1)
    common = {
        "prompt": PROMPTS[0],
        "num_inference_steps": steps,
        "guidance_scale": scale,
        "output_type": "latent",
    }
    if source.family == "sd3":
        expected = pipeline(**common, **SIZE, latents=noise, sigmas=[1.0, 0.75, 0.5, 0.25]).images
    elif source.family == "sdxl":
        own, pipeline.scheduler = (
            pipeline.scheduler,
            DDIMScheduler.from_config(
                pipeline.scheduler.config, timestep_spacing="trailing", clip_sample=False
            ),
        )
        expected = pipeline(**common, **SIZE, latents=noise).images
        pipeline.scheduler = own
    else:
        video = pipeline(**common, **SIZE, latents=noise.transpose(1, 2), num_frames=9).frames
        expected = video.transpose(1, 2)
    uncond = source.prompts().encode_uncond()
    arrived = sample_teacher(
        denoiser, noise, cond.take(torch.tensor([0])), uncond, num_steps=steps, guidance=scale
    )
    size = float(expected.square().mean().sqrt())
    torch.testing.assert_close(arrived, expected, atol=2e-4 * size, rtol=0)


@torch.no_grad()
def test_bfloat16_is_close_to_float32_and_comes_out_as_float32(source, denoiser, cond):
    xt, t = noise_like(source, 3), torch.tensor([0.3, 0.7, 1.0])
    exact = denoiser(xt, t, cond)
    for options in ({"bf16": True}, {"dtype": torch.bfloat16}):
        rough = open_source(source.folder, **options).denoiser()(xt, t, cond)
        assert rough.dtype == torch.float32
        assert not torch.equal(exact, rough)
        # Measured: up to 4.2 % (SDXL, whose tiny groups hold one channel each).
        assert (exact - rough).square().mean() < 0.06**2 * exact.square().mean()


@torch.no_grad()
@pytest.mark.parametrize("family", ["sdxl", "sd35-large", "cogvideox-5b"], indirect=True)
def test_sharded_weights_are_the_same_weights(family, source, denoiser, cond, tmp_path):
    sharded = make_tiny_pipeline(tmp_path, family, max_shard_size="100KB")
    assert list(sharded.glob("*/*.safetensors.index.json")), "the planted folder is not sharded"
    xt, t = noise_like(source, 3), torch.tensor([0.3, 0.7, 1.0])
    assert torch.equal(open_source(sharded).denoiser()(xt, t, cond), denoiser(xt, t, cond))


def test_it_refuses_a_folder_without_a_pipeline(tmp_path):
    with pytest.raises(MissingFileError, match=r"expected a diffusers folder with model_index\.json"):
        open_source(tmp_path)


def test_it_refuses_a_pipeline_of_another_family(tmp_path):
    (tmp_path / "model_index.json").write_text('{"_class_name": "FluxPipeline"}')
    with pytest.raises(
        UsageError, match=r"expected a pipeline of StableDiffusionXLPipeline, .*'FluxPipeline'"
    ):
        open_source(tmp_path)


def test_it_refuses_a_hub_id_that_cannot_be_fetched(monkeypatch):
    with pytest.raises(MissingFileError, match=r"^/nowhere: expected a folder or a hub id .* no such folder"):
        open_source("/nowhere")

    def offline(*args, **kwargs):
        raise OSError("no route\nto the hub")

    monkeypatch.setattr("flashbulb_distill.teachers.load.snapshot_download", offline)
    with pytest.raises(
        FileNotFoundError, match=r"somebody/teacher: .* no such folder, and no route$"
    ) as caught:
        open_source("somebody/teacher")
    assert not isinstance(caught.value, UsageError), "a job may be started again when there is a route"


@pytest.mark.parametrize(
    ("variant", "names"),
    [
        (None, {"unet/w.safetensors", "unet/w-00001-of-00002.safetensors"}),
        ("fp16", {"unet/w.fp16.safetensors", "unet/w.fp16-00001-of-00002.safetensors"}),
    ],
)
def test_of_a_hub_id_only_the_weights_that_are_read_are_fetched(variant, names, monkeypatch, tmp_path):
    listed = [
        "model_index.json", "unet/config.json", "tokenizer/merges.txt", "sd_xl_base_1.0.safetensors",
        "unet/w.safetensors", "unet/w.fp16.safetensors", "unet/w.bin", "unet/model.onnx",
        "unet/w-00001-of-00002.safetensors", "unet/w.fp16-00001-of-00002.safetensors",
    ]  # fmt: skip
    fetched = set()

    def snapshot(hub_id, *, revision, **patterns):
        fetched.update(filter_repo_objects(listed, **patterns))
        return tmp_path

    (tmp_path / "model_index.json").write_text('{"_class_name": "StableDiffusionXLPipeline"}')
    monkeypatch.setattr("flashbulb_distill.teachers.load.snapshot_download", snapshot)
    open_source("somebody/teacher", variant=variant)
    assert fetched == names | set(listed[:3])


@pytest.mark.parametrize("family", ["sdxl"], indirect=True)
def test_what_else_lies_beside_the_weights_is_no_part_of_the_teacher(source, tmp_path):
    """The hub's cache has one folder for all that was ever fetched of a commit: a resumed run was refused."""
    folder = shutil.copytree(source.folder, tmp_path / "teacher")
    before = open_source(folder).sha256()
    assert "unet/diffusion_pytorch_model.safetensors" in before
    for name in ("unet/diffusion_pytorch_model.fp16.safetensors", "sd_xl_base_1.0.safetensors"):
        (folder / name).write_bytes(b"of another variant")
    assert open_source(folder).sha256() == before
    other = open_source(folder, variant="fp16").sha256("unet")
    assert {name for name in other if name.endswith(".safetensors")} == {
        "unet/diffusion_pytorch_model.fp16.safetensors"
    }


@pytest.mark.parametrize("family", ["sdxl"], indirect=True)
def test_a_folder_of_ones_own_is_read_as_it_is_where_it_has_no_files_of_the_variant(
    source, denoiser, monkeypatch, tmp_path
):
    """SDXL's recipe asks for fp16, and what save_pretrained wrote was refused: no file named ....fp16.safetensors."""
    own = open_source(source.folder, variant="fp16")
    assert own.sha256() == source.sha256()
    for ours, theirs in ((own.denoiser(), denoiser), (own.codec(), source.codec())):
        assert all(map(torch.equal, ours.parameters(), theirs.parameters()))
    assert torch.equal(own.prompts().encode(["a dog"]).tokens, source.prompts().encode(["a dog"]).tokens)

    # As fetched, with another VAE put into its place.
    mixed = shutil.copytree(source.folder, tmp_path / "mixed")
    for path in (mixed / "unet").glob("*.safetensors"):
        path.rename(path.with_suffix(".fp16.safetensors"))
    read = {
        name for name in open_source(mixed, variant="fp16").sha256("unet", "vae") if "safetensors" in name
    }
    assert read == {
        f"{part}/diffusion_pytorch_model{end}.safetensors" for part, end in (("unet", ".fp16"), ("vae", ""))
    }
    assert open_source(mixed, variant="fp16").codec().vae.dtype == torch.float32
    open_source(mixed, variant="fp16").denoiser()

    # Of a hub id other files may lie there by chance: they are not what was asked for.
    monkeypatch.setattr(
        "flashbulb_distill.teachers.load.snapshot_download", lambda *a, **k: str(source.folder)
    )
    fetched = open_source("somebody/teacher", variant="fp16")
    assert not any(name.endswith(".safetensors") for name in fetched.sha256())
    with pytest.raises(OSError, match="fp16"):
        fetched.codec()


@pytest.mark.parametrize("family", ["sdxl"], indirect=True)
def test_weights_that_are_pickles(source, tmp_path):
    pickled = DiffusionPipeline.from_pretrained(source.folder)
    pickled.save_pretrained(tmp_path, safe_serialization=False)
    with pytest.raises(OSError, match="safetensors"):
        open_source(tmp_path).denoiser()


@pytest.mark.parametrize("family", ["cogvideox-2b", "sdxl"], indirect=True)
def test_a_clip_too_large_for_the_memory_is_looked_at_in_tiles(source, monkeypatch):
    """A plan fitted CogVideoX to 24 GiB; the doctor, which decodes a clip, refused to begin on them."""
    codec = source.codec()
    latents, vae = noise_like(source, 1), codec.vae
    whole = {"encode": vae.encode, "decode": vae.decode}

    def too_large(name):
        def compute(x):
            if not vae.use_tiling:
                raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 30.00 GiB.")
            return whole[name](x)

        return compute

    with torch.no_grad():
        vae.use_tiling = codec.is_video
        expected = codec(codec.decode(latents))
        vae.use_tiling = False
        for name in whole:
            monkeypatch.setattr(vae, name, too_large(name))
        if codec.is_video:
            assert torch.equal(codec(codec.decode(latents)), expected)
            assert not vae.use_tiling
        else:
            with pytest.raises(torch.OutOfMemoryError):
                codec.decode(latents)
    with pytest.raises(torch.OutOfMemoryError):  # training computes what it says, or not at all
        codec.decode(latents)


@pytest.mark.parametrize("family", ["sdxl"], indirect=True)
def test_a_vae_with_statistics_for_each_channel(source):
    codec = source.codec()
    codec.vae.register_to_config(latents_mean=[0.0] * 4)
    with pytest.raises(UsageError, match="expected a VAE with one scaling and shift"):
        VaeCodec(codec.vae)


@pytest.mark.parametrize(
    ("family", "size", "message"),
    [
        ("sdxl", {"width": 60, "height": 32}, "shape: expected multiples of 8, got 60x32"),
        ("sdxl", {"width": 64, "height": 32, "frames": 9}, "shape: expected one frame of a picture, got 9"),
        (
            "cogvideox-2b",
            {"width": 64, "height": 32, "frames": 10},
            r"shape: expected 1 \+ 4 k frames, got 10",
        ),
        ("sd3", {"width": 72, "height": 64}, "shape: expected multiples of 16, got 72x64"),
        (
            "cogvideox-2b",
            {"width": 64, "height": 40, "frames": 9},
            "shape: expected multiples of 16, got 64x40",
        ),
    ],
    indirect=["family"],
)
def test_a_size_that_no_bundle_can_have_is_refused_before_anything_is_drawn(source, size, message):
    teacher = PretrainedTeacher(source, Shape(**size), torch.device("cpu"))
    with pytest.raises(UsageError, match=message):
        _ = teacher.latent_shape


@pytest.mark.parametrize("family", ["cogvideox-5b"], indirect=True)
def test_a_network_with_patches_over_time_is_refused(source):
    network = source.denoiser().transformer
    network.register_to_config(patch_size_t=2)
    with pytest.raises(UsageError, match=r"expected a CogVideoX 1\.0 network"):
        CogVideoXDenoiser(network, "variance-preserving")


def test_a_tokenizer_that_is_sentencepieces_file_alone_gives_sentencepieces_ids(tmp_path):
    """CogVideoX's repositories have no tokenizer.json, and without sentencepiece transformers asked for tiktoken."""
    import sentencepiece

    text = "a red dog runs over the green hill while two small birds sing in tall trees"
    model = io.BytesIO()
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=(text[start:] + text[:start] for start in range(len(text))),
        model_writer=model,
        vocab_size=60,
        hard_vocab_limit=False,
        pad_id=0,  # ids as T5 has them
        eos_id=1,
        unk_id=2,
        bos_id=-1,
        minloglevel=2,
    )
    folder = make_tiny_pipeline(tmp_path, "cogvideox-2b")
    (folder / "tokenizer" / "tokenizer.json").unlink()
    (folder / "tokenizer" / "spiece.model").write_bytes(model.getvalue())
    (ids,) = open_source(folder).prompts().tokenise(PROMPTS)
    pieces = sentencepiece.SentencePieceProcessor(model_proto=model.getvalue())
    expected = [[*pieces.encode(prompt)[: ids.shape[1] - 1], 1] for prompt in PROMPTS]
    assert ids.tolist() == [row + [0] * (ids.shape[1] - len(row)) for row in expected]
    assert len(set(expected[0])) > 3
