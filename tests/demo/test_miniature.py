from diffusers import StableDiffusionPipeline

from lowvram_db.photos import find_photos


def test_the_miniature_is_a_pipeline_that_draws(miniature, photos):
    assert len(find_photos(photos, "subject.photos")) == 5
    pipeline = StableDiffusionPipeline.from_pretrained(miniature)
    assert pipeline("a ball", num_inference_steps=1).images[0].size == (64, 64)
