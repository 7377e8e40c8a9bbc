"""Compare trials from their records: tables, statistics, pictures and one report. Knows no torch."""
