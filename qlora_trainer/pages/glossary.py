"""What figures mean that stand on more than one page, as ``(term, meaning)``."""

LOSS = (
    "Loss, nats per token",
    "How surprised the model is by the right answer: minus the natural logarithm of the probability it gave to "
    "each answer token, averaged over all answer tokens of the test rows. Lower is better; 0 is certain and right.",
)
PERPLEXITY = (
    "Perplexity",
    "The loss as a number of equally likely choices per token: e to the power of the loss. 1 means certain and right.",
)
INTERVAL = (
    "Interval",
    "Where the figure would lie for other test rows of the same kind, by bootstrap: rows are drawn again with "
    "replacement and the figure is taken anew. Differences between two stages use the same draws for both.",
)
METRICS = (
    "Exact match, slot F1, token F1, ROUGE-L, BLEU",
    "Agreement of generated answers (greedy decoding) with the reference: wholly equal; equal fields of a JSON "
    "answer; shared tokens; longest common subsequence; shared n-grams.",
)
