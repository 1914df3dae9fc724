// Package task holds what the module knows about tasks and their reports: what a report is and whether it is finished,
// what became of a submission, and the keys under which both are kept.
//
// The package is pure. It does no I/O of its own, and it does not know Caddy, HTTP, upstreams, caches or storages.
package task
