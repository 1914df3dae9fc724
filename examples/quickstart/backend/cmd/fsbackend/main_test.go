package main

import (
	"bufio"
	"context"
	"crypto/tls"
	"crypto/x509"
	"io"
	"net/http"
	"os"
	"strings"
	"testing"
)

// TestRun starts the command, and sends requests to the addresses that it prints.
func TestRun(t *testing.T) {
	for name, test := range map[string]struct {
		flags    []string
		nodes    []string
		refusal  int
		inQuery  int // the status of an answer to the right secret in the query
		inHeader int
	}{
		"default": {nil, []string{"node-1"}, 400, 200, 200},
		"TLS": {
			[]string{"-tls", "-secret-in=header", "-refuse=401", "-submit-result=numbers", "-listen=localhost:0,127.0.0.1:0,127.0.0.1:0"},
			[]string{"1", "2"}, 401, 401, 200,
		},
		"old": {[]string{"-secret-in=query", "-secret-in=serect", "-refuse=403", "-submit-result=manual"}, []string{"node-1"}, 403, 200, 403},
	} {
		t.Run(name, func(t *testing.T) {
			ctx, cancel := context.WithCancel(t.Context())
			ended := make(chan error)
			reader, writer := io.Pipe()
			go func() {
				err := run(ctx, append([]string{"-listen=127.0.0.1:0,127.0.0.1:0"}, test.flags...), writer)
				writer.CloseWithError(err)
				ended <- err
			}()
			printed := bufio.NewScanner(reader)
			line := func() []string {
				if !printed.Scan() {
					t.Fatalf("no more lines: %v", printed.Err())
				}
				return strings.Fields(printed.Text())
			}
			upstreams := map[string]string{} // secrets by address
			if broker := line(); broker[0] == "broker" {
				upstreams[broker[1]] = broker[2]
			}
			for _, name := range test.nodes {
				if node := line(); node[0] == "node" && node[1] == name {
					upstreams[node[2]] = node[3]
				}
			}
			if len(upstreams) != 1+len(test.nodes) {
				t.Fatalf("it prints %v", upstreams)
			}
			client := new(http.Client)
			certificateFile := ""
			if name == "TLS" {
				line()
				certificateFile = strings.Trim(line()[2], `"`)
				line()
				pem, err := os.ReadFile(certificateFile)
				if err != nil {
					t.Fatal(err)
				}
				pool := x509.NewCertPool()
				pool.AppendCertsFromPEM(pem)
				client.Transport = &http.Transport{TLSClientConfig: &tls.Config{RootCAs: pool}}
			}
			for address, secret := range upstreams {
				for query, want := range map[string]int{"": test.refusal, "?secret=wrong": test.refusal, "?secret=" + secret: test.inQuery} {
					if got := status(t, client, address+"/system-info"+query, ""); got != want {
						t.Errorf("%s%s: status %d, want %d", address, query, got, want)
					}
				}
				if got := status(t, client, address+"/system-info", secret); got != test.inHeader {
					t.Errorf("%s with the secret in the header: status %d, want %d", address, got, test.inHeader)
				}
			}
			client.CloseIdleConnections()
			cancel()
			if err := <-ended; err != nil {
				t.Error(err)
			}
			if _, err := os.Stat(certificateFile); certificateFile != "" && err == nil {
				t.Errorf("it leaves %s behind", certificateFile)
			}
		})
	}
}

func status(t *testing.T, client *http.Client, target, secret string) int {
	t.Helper()
	request, err := http.NewRequestWithContext(t.Context(), http.MethodGet, target, nil)
	if err != nil {
		t.Fatal(err)
	}
	if secret != "" {
		request.Header.Set("secret", secret)
	}
	response, err := client.Do(request)
	if err != nil {
		t.Fatal(err)
	}
	response.Body.Close()
	return response.StatusCode
}

func TestBadFlags(t *testing.T) {
	for flag, want := range map[string]string{
		"-listen=127.0.0.1:0":             "at least one node",
		"-listen=127.0.0.1:0,192.0.2.1:0": `"192.0.2.1:0": expected localhost`,
		"-listen=127.0.0.1:0,22001":       `"22001": expected localhost`,
		"-secret-in=cookie":               `"cookie": expected header, query or serect`,
		"-refuse=500":                     "expected 400, 401 or 403",
		"-submit-result=none":             "expected ids, numbers, manual or absent",
		"-forget=0":                       "-forget must be positive",
		"now":                             `unexpected argument "now"`,
	} {
		if _, err := parse([]string{flag}); err == nil || !strings.Contains(err.Error(), want) {
			t.Errorf("%s: %v, want %s", flag, err, want)
		}
	}
}
