"""What every figure of the report means, in one or two sentences each."""

GLOSSARY: tuple[tuple[str, str], ...] = (
    (
        "Loss, nats per token",
        "How surprised the model is by the right answer: minus the natural logarithm of the probability it gave to "
        "each answer token, averaged over all answer tokens of the test rows. Lower is better; 0 is certain and right.",
    ),
    (
        "Perplexity",
        "The loss as a number of equally likely choices per token: e to the power of the loss. "
        "1 means certain and right.",
    ),
    (
        "Interval",
        "Where the figure would lie for other test rows of the same kind, by bootstrap: rows are drawn again with "
        "replacement and the figure is taken anew. Differences between two stages use the same draws for both.",
    ),
    (
        "Exact match, slot F1, token F1, ROUGE-L, BLEU",
        "Agreement of generated answers (greedy decoding) with the reference: wholly equal; equal fields of a JSON "
        "answer; shared tokens; longest common subsequence; shared n-grams.",
    ),
    (
        "Trained model",
        "The quantized base with the unmerged adapter: what training optimised, and what every file is compared with.",
    ),
    (
        "KL to trained",
        "How far the model's next-token probabilities are from those of the trained model, averaged over "
        "answer tokens. 0 means the same model.",
    ),
    ("Top-1 agreement", "Share of answer tokens for which the model and the trained model rank the same token first."),
    (
        "Gain kept",
        "(loss of the quantized base - loss of the file) / (loss of the quantized base - loss of the trained model). "
        "100 % means that the file is as good as the trained model; more means better than it, on these rows.",
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
