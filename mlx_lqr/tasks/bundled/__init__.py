"""The texts, word families and questions that tasks take by default."""
