"""One aiohttp listener per `listen` entry of the module http: health, metrics, the admin API."""
