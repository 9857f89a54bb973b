"""The loss on fixed pictures while training goes on: what is memorised and what is forgotten, without drawing anything.

Of up to four photos of the subject and four class images, three views each, every one at a noise and a timestep of its
own, which follow from the picture alone: the same for every run and every machine. In metrics.jsonl a validation is a
line by itself, of the step after which it was made; step 0 is the base model:

    {"step": 0, "validation_subject": 1.0, "validation_subject_loss": 0.1312, "validation_class": 1.0, ...}

validation_subject, validation_held_out, validation_class: the mean loss as a ratio to step 0, of photos that are
trained on, of photos that `train.hold_out` keeps back, and of class images; each is there only where there are such
pictures, and once step 0 is known. NAME_loss: the mean loss itself. A subject that falls while held-out photos do not
is memorised; a class that rises is being forgotten.
"""
