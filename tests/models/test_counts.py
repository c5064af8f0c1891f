"""Parameter counts of the models, from shapes alone, against the published ones."""

import flax.traverse_util
import jax
import jax.numpy as jnp
import pytest

from memopt.models import common, gpt2, llama, lstm, resnet, unet, vit

pytestmark = pytest.mark.loose_promotion

TOKENS = jax.ShapeDtypeStruct((1, 8), jnp.int32)

LANGUAGE_MODELS = [
    (gpt2.GPT2, gpt2.GPT2_124M, 124_439_808),
    (gpt2.GPT2, gpt2.GPT2_355M, 354_823_168),
    (gpt2.GPT2, gpt2.GPT2_774M, 774_030_080),
    (gpt2.GPT2, gpt2.GPT2_1558M, 1_557_611_200),
    (llama.Llama, llama.LLAMA_1B, 1_235_814_400),
    (llama.Llama, llama.LLAMA_1B_UNTIED, 1_235_814_400 + 128_256 * 2_048),
    (llama.Llama, llama.LLAMA_8B, 8_030_261_248),
    (llama.Llama, llama.LLAMA_70B, 70_553_706_496),
    (lstm.LSTM, lstm.LSTM_MEDIUM, 19_775_200),
    (lstm.LSTM, lstm.LSTM_LARGE, 66_022_000),
]
IMAGE_MODELS = [
    (vit.ViT, vit.VIT_B16, 86_567_656),
    (vit.ViT, vit.VIT_L16, 304_326_632),
    (resnet.ResNet, resnet.RESNET18, 11_689_512),
    (resnet.ResNet, resnet.RESNET50, 25_557_032),
    (unet.UNet, unet.UNET_2D, 31_030_658),
]


def shapes(model, inputs):
    """Give the shapes of a model's parameters."""
    return jax.eval_shape(model.init, jax.random.key(0), inputs)["params"]


@pytest.mark.parametrize(("model", "config", "count"), LANGUAGE_MODELS)
def test_language_models_have_the_published_size(model, config, count):
    assert common.parameter_count(shapes(model(config), TOKENS)) == count


@pytest.mark.parametrize(("model", "config", "count"), IMAGE_MODELS)
def test_image_models_have_the_published_size(model, config, count):
    images = jax.ShapeDtypeStruct((1, *config.image_shape), jnp.float32)
    assert common.parameter_count(shapes(model(config), images)) == count


def test_the_3d_unet_has_the_published_size():
    """The paper counts 19,069,955 and leaves out the scales and shifts of the normalization."""
    images = jax.ShapeDtypeStruct((1, *unet.UNET_3D.image_shape), jnp.float32)
    flat = flax.traverse_util.flatten_dict(shapes(unet.UNet(unet.UNET_3D), images))
    counted = {path: leaf for path, leaf in flat.items() if not path[-2].startswith("norm")}
    assert common.parameter_count(counted) == 19_069_955


@pytest.mark.parametrize(("model", "config"), [(gpt2.GPT2, gpt2.GPT2_124M), (llama.Llama, llama.LLAMA_1B)])
def test_an_unrolled_model_has_as_many_parameters(model, config):
    unrolled = type(config)(**{**vars(config), "scan": False, "layers": 3})
    scanned = type(config)(**{**vars(config), "layers": 3})
    assert common.parameter_count(shapes(model(unrolled), TOKENS)) == common.parameter_count(
        shapes(model(scanned), TOKENS)
    )


def test_positions_of_gpt2_124m_with_the_padded_vocabulary():
    padded = gpt2.GPT2Config(vocabulary=50_304)
    assert common.parameter_count(shapes(gpt2.GPT2(padded), TOKENS)) == 124_439_808 + (50_304 - 50_257) * 768


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: gpt2.GPT2Config(width=10, heads=3), "width 10 is not a multiple of heads 3"),
        (lambda: llama.LlamaConfig(width=10, heads=3), "width 10 is not a multiple of heads 3"),
        (lambda: llama.LlamaConfig(heads=8, kv_heads=3), "heads 8 is not a multiple of kv_heads 3"),
        (lambda: vit.ViTConfig(width=10, heads=3), "width 10 is not a multiple of heads 3"),
        (lambda: vit.ViTConfig(image=20), "image 20 is not a multiple of patch 16"),
        (lambda: unet.UNetConfig(spatial=(16, 20)), r"spatial \(16, 20\) holds a size that is no multiple of 16"),
    ],
)
def test_sizes_that_do_not_divide_are_refused(make, message):
    with pytest.raises(ValueError, match=message):
        make()
