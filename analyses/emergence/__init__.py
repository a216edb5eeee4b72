"""When, where and by whom outliers are written while a model trains."""
