"""Who reads which slots together: layouts, plans and the cost model that chooses among them."""
