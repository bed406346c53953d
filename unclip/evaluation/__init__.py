"""What the models are worth, measured.

- A protocol and its result folder, `python -m unclip.evaluate`: protocol, captions, references,
  drawing, measuring, run; coco writes MS-COCO's list.
- What is computed: encoders, resize, metrics, intervals; shapes (the oracle's verdict), prior.
- What stands on result folders: results reads them; report, compare, ab, sweep and what they are
  made of, pages, curves, neighbours, redrawn, sweeping.
- Probes: probe, zero_shot, typographic of a CLIP, inversion of a decoder; labelled reads pictures.
"""
