"""Keeps documents in Convex equal to rows in an application's Postgres."""
