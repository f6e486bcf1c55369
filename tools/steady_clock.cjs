// Loaded by node before llama-server's web page is built (build_wheel.py): SvelteKit names its version after the time,
// and the same sources should give the same page.

if (process.argv[1]?.includes('vite')) {
	const time = 1000 * Number(process.env.SOURCE_DATE_EPOCH);
	Date.now = () => time;
}
