"""What a quantized cache does to the videos of a person's own model, and the statistics of its keys and values.

| module | what it does |
|---|---|
| `loop` | the closed loop: one video with several caches, for networks of any family |
| `noise`, `rows` | the control with noise; rows of figures, their table and their picture |
| `inputs` | a released checkpoint, text embeddings and a VAE from files |
| `statistics` | spectra, means and errors of K and V, recorded while a network runs |

`qvg bench quality --checkpoint`, `qvg bench statistics` and the node Measure Presets (QVG) are thin over these.
"""
