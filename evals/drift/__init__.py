"""How much quality was lost: questions, answers, and the drift gate."""
