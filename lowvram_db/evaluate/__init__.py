"""What a run has learned: scores of every checkpoint that is kept, and the step to keep.

`lowvram-db evaluate RUN` writes RUN/evaluation.json (and the same as rows of RUN/evaluation.csv):

    {
      "format": 1,
      "key": "...",                      digest of all that the scores follow from
      "backbone": "dinov2 facebook/dinov2-base; prompts by clip openai/clip-vit-base-patch32",
      "compared_with": "photos",         or "held-out photos"
      "photos": 5,
      "photos_similarity": 0.71,         how alike those photos are among themselves
      "settings": {"prompts": [...], "class_prompt": "...", "seeds": 4, "guidance": 7.0, "steps": 30,
                   "resolution": 512},
      "base": SCORES,                    of the base model, with the same prompts and noise
      "checkpoints": [{"step": 200, "path": "checkpoints/step-000200", "scores": SCORES,
                       "findings": ["not yet learned"]}, ...],
      "recommended": {"step": 600, "path": "checkpoints/step-000600", "reason": "one sentence"}
    }

SCORES is {name: {"mean": m, "low": l, "high": h, "by_seed": [...]} or null}, the interval one of 95% over seeds, null
what the backbone cannot measure:

    subject          similarity of pictures of the subject's prompts to its photos
    prompt           agreement of those pictures with their prompts
    class_likeness   similarity of pictures of the class prompt to the subject's photos: lower is better
    class_diversity  mean distance between pictures of the class prompt, as a ratio to the base model's
    memorised        share of the subject's pictures that are nearer to one training photo than any two photos are to
                     each other

"findings" are of: "not yet learned", "memorised", "the class is forgotten", "the model is ruined". Paths are relative
to the run's folder.
"""
