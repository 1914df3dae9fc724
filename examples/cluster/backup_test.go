package cluster_test

import (
	"fmt"
	"net/http"
	"os"
	"os/exec"
	"path/filepath"
	"testing"
)

// Reports are exported from Redis and imported into an empty one, also by way of a folder. docs/BACKUP.md has the commands.
func TestBackup(t *testing.T) {
	c := newCluster(t)
	one := c.start()
	reports := one.collect(c.mustScan(1, text(1)), c.mustScan(2, text(2000)))
	one.stop()

	dir := t.TempDir()
	redis := c.backupOf(dir, "redis", `redis {
		address {env.REDIS_ADDRESS}
		password {env.REDIS_PASSWORD}
		key_prefix fsbroker
	}`)
	folder := c.backupOf(dir, "folder", fmt.Sprintf("file_system %q", filepath.Join(dir, "reports")))
	first, second := filepath.Join(dir, "first.tar"), filepath.Join(dir, "second.tar")
	for _, args := range [][]string{
		{"export", "--config", redis, "--output", first},
		{"import", "--config", folder, "--input", first},
		{"export", "--config", folder, "--output", second},
	} {
		c.storageCommand(args...)
	}
	c.forget()
	if err := c.redis.Client.FlushAll(t.Context()).Err(); err != nil {
		t.Fatal(err)
	}
	one.run()
	for path := range reports {
		one.want(path, http.StatusNotFound, fromNowhere)
	}
	one.stop()

	for _, archive := range []string{first, second} {
		if err := c.redis.Client.FlushAll(t.Context()).Err(); err != nil {
			t.Fatal(err)
		}
		c.storageCommand("import", "--config", redis, "--input", archive)
		one.run()
		one.wantAll(reports)
		one.stop()
	}
}

// backupOf writes a Caddyfile for caddy storage, and returns its name.
func (c *cluster) backupOf(dir, name, storage string) (file string) {
	c.t.Helper()
	file = filepath.Join(dir, "Caddyfile."+name)
	if err := os.WriteFile(file, []byte("{\n\tstorage "+storage+"\n}\n"), 0o600); err != nil {
		c.t.Fatal(err)
	}
	return file
}

// storageCommand runs caddy storage.
func (c *cluster) storageCommand(args ...string) {
	c.t.Helper()
	command := exec.CommandContext(c.t.Context(), os.Args[0], append([]string{"storage"}, args...)...)
	command.Env = c.env
	if output, err := command.CombinedOutput(); err != nil {
		c.t.Fatalf("caddy storage %q: %v\n%s", args, err, output)
	}
}
