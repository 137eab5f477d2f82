"""What every figure of the report means, in one or two sentences each."""

from qlora_trainer.pages.glossary import INTERVAL, LOSS, METRICS, PERPLEXITY

GLOSSARY: tuple[tuple[str, str], ...] = (
    LOSS,
    PERPLEXITY,
    INTERVAL,
    METRICS,
    (
        "Trained model",
        "The base as training had it, quantized unless the recipe says otherwise, with the unmerged adapter: what "
        "training optimised, and what every file is compared with.",
    ),
    (
        "KL to trained",
        "Kullback-Leibler divergence: how far the model's next-token probabilities are from those of the trained "
        "model, averaged over answer tokens. 0 means the same model.",
    ),
    ("Top-1 agreement", "Share of answer tokens for which the model and the trained model rank the same token first."),
    (
        "Gain kept",
        "(loss of the quantized base - loss of the file) / (loss of the quantized base - loss of the trained model). "
        "Where nothing was quantized, the 16-bit base stands in the quantized one's place. 100 % means that the file "
        "is as good as the trained model; more means better than it, on these rows.",
    ),
    (
        "Loss above trained",
        "Loss of the file minus that of the trained model on the same rows, in nats per token, with its paired "
        "interval. Below 0 the file is better than the trained model, on these rows.",
    ),
    (
        "Bar",
        "What the recipe asks of a quantized file: the share of the learned nats that it must keep, at the lower end "
        "of the interval. Where training won too little to divide by, KL and the loss above the trained model's take "
        "its place. A file below the bar is kept and marked, and never recommended. Adapters and 16-bit files have no "
        "bar.",
    ),
    (
        "Rung",
        "How much was done to round well: 0 each weight to the nearest value, 1 GPTQ, 2 GPTQ and tuned scales, "
        "3 learned rounding and tuned scales, 4 quantization-aware merging and tuned scales, 5 more bits for the worst "
        "layers. The exporter climbs until a file meets the bar; validation rows choose, test rows are reported.",
    ),
    (
        "GPTQ",
        "Rounds a weight matrix column by column and lets the columns that follow make up for each error, so that the "
        "layer's outputs on training rows stay near those of the trained model (arXiv 2210.17323).",
    ),
    (
        "Tuned scales",
        "The integers stay as they are, and the scale of each group is trained until the file's next-token "
        "probabilities are nearest to the trained model's. Neither size nor format changes.",
    ),
    (
        "Learned rounding",
        "Whether each weight goes up or down is trained block by block, with the trained model as the teacher "
        "(AutoRound, arXiv 2309.05516).",
    ),
    (
        "Merge base",
        "What the adapter was added to: dequantized is the base that training saw, original the 16-bit base before it "
        "was quantized. Neither is always better, so both are tried and measured on the validation rows.",
    ),
    (
        "Dead zone",
        "A learned change smaller than half a rounding step can vanish: the weight falls back to the value it had. "
        "The share that survived is the part of a layer's learned change that is in the file: 100 % all of it, 0 % "
        "nothing. Rounding noise moves it a little, also above 100 %.",
    ),
    (
        "Recovered",
        "What training won, divided by what quantization cost. Above 1, training on the task more than paid for "
        "storing the base in few bits.",
    ),
    (
        "Verified",
        "The file was loaded again by its runtime and gave the outputs of the weights that were meant to be written, "
        "within a stated tolerance. It says that the file is faithful; gain kept says whether it is good.",
    ),
    (
        "SQNR",
        "Signal to quantization noise ratio of a weight matrix in decibels: each 6 dB more halves the error. "
        "4-bit NF4 gives about 20.7 dB on normally distributed weights.",
    ),
    (
        "Tokens/s and peak memory",
        "Tokens scored per second of forward passes, and the largest memory while measuring that stage, "
        "on the machine named under Environment. Generated tokens per second are counted apart.",
    ),
)
