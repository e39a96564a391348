"""The fixed prompts that models answer freely; written for this purpose, and never changed without a new version."""

PROMPTS: tuple[tuple[str, str], ...] = (
    ("fact", "What is the capital of France, and what is it known for?"),
    ("explain", "Explain in simple words why the sky is blue."),
    ("list", "List five fruits that grow on trees, one per line."),
    ("story", "Continue this story: The old lighthouse had been dark for years, until one night"),
    ("code", "Write a Python function that returns the largest number in a list."),
    ("arithmetic", "A baker has 24 rolls and sells 9 of them. How many rolls are left? Show your work."),
    ("translation", "Translate into French: The book is on the table."),
    ("summary", "Summarize in one sentence: Bees carry pollen from flower to flower, and many crops depend on it."),
    ("advice", "How can I fall asleep more easily? Give me three tips."),
    ("rewrite", "Rewrite this more politely: Send me the report now."),
    ("comparison", "What is the difference between a lake and a sea?"),
    ("poem", "Write a short poem about the first snow."),
    ("steps", "Describe, step by step, how to make a cup of tea."),
    ("reason", "All birds have feathers. A penguin is a bird. Does a penguin have feathers? Why?"),
    ("letter", "Write a short thank-you note to a neighbour who watered my plants."),
    ("query", "Write an SQL query that selects the names of all customers from Berlin."),
)
"""Name and text of each prompt, of as many kinds as there are, so that the first ones are varied too."""
