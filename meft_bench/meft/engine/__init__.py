"""How the method runs fast with its rows in host memory; none of it changes what is computed but for stated choices."""
