"""From scores to a plan: compute budgets, allocation, sensitivity."""
