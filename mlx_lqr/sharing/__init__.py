"""Controllers for others: as control vectors of llama.cpp and repeng, and on the Hugging Face hub."""
