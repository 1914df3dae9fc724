package fsbroker

import (
	"bytes"
	"encoding/json"
	"errors"
	"fmt"
	"net/http"
	"net/http/httptest"
	"net/url"
	"strings"
	"testing"

	"go.uber.org/zap"
	"go.uber.org/zap/zapcore"

	"github.com/caddyserver/caddy/v2"
	"github.com/caddyserver/caddy/v2/caddyconfig/caddyfile"
	"github.com/caddyserver/caddy/v2/modules/caddyhttp"

	"github.com/caddy-fsbroker/caddy-fsbroker/internal/redact"
)

// newEncoder returns a provisioned encoder, configured as by `format` in a Caddyfile.
func newEncoder(t testing.TB, format string) zapcore.Encoder {
	t.Helper()
	d := caddyfile.NewTestDispenser(format)
	d.Next()
	module, err := caddyfile.UnmarshalModule(d, "caddy.logging.encoders."+d.Val())
	if err != nil {
		t.Fatal(err)
	}
	ctx, cancel := caddy.NewContext(caddy.Context{Context: t.Context()})
	t.Cleanup(cancel)
	if err := module.(caddy.Provisioner).Provision(ctx); err != nil {
		t.Fatal(err)
	}
	return module.(zapcore.Encoder)
}

// planted is a secret with characters that end, escape or separate something elsewhere. It begins and ends with a mark, so
// that a test finds a part of it.
const planted = `planted "a\b' c;#%/head-planted`

// wantNoSecret checks that text has no part of the planted secret.
func wantNoSecret(t *testing.T, text string) {
	t.Helper()
	for line := range strings.Lines(text) {
		if strings.Contains(line, "planted") {
			t.Errorf("a secret is in %s", line)
		}
	}
}

// The places of an entry that hold secrets, as Caddy logs them.
func TestLogEncoderRedacts(t *testing.T) {
	header := http.Header{
		"Authorization": {"Bearer " + planted}, "Secret": {planted, planted}, "X-Api-Key": {planted}, "Accept": {"kept"},
		"Referer": {"https://portal.example.com/?serect=" + planted}, "X-Forwarded-Uri": {"/task?secret=" + planted},
	}
	request := func(uri string) zapcore.Field {
		r := httptest.NewRequest(http.MethodGet, "/", nil)
		r.RequestURI, r.Header = uri, header
		return zap.Object("request", caddyhttp.LoggableHTTPRequest{Request: r, ShouldLogCredentials: true})
	}
	response := http.Header{"Location": {"https://fsbroker.example.com/task?secret=" + planted}, "Secret": {planted}}
	entries := map[string]func(*zap.Logger){
		"access": func(l *zap.Logger) {
			l.WithLazy(request("/task?secret="+planted)).Info("handled request", zap.String("user_id", "portal"),
				zap.Object("resp_headers", caddyhttp.LoggableHTTPHeader{Header: response}))
		},
		"With": func(l *zap.Logger) {
			l = l.With(request("/task?SECRET=" + planted))
			l.Error("one", zap.Error(errors.New("/task?secret="+planted)))
			l.Error("two")
		},
		"namespace": func(l *zap.Logger) {
			l.With(zap.Namespace("space"), request("/task?a=b;secret="+planted)).Info("", zap.String("uri", "/?%73e%72ect="+planted))
		},
		"reverse_proxy": func(l *zap.Logger) {
			l.Debug("upstream roundtrip", request("/submit?%73ecret="+planted), zap.Object("headers", caddyhttp.LoggableHTTPHeader{Header: response}))
		},
		"rewrite": func(l *zap.Logger) {
			l.Debug("rewrote request", request("/#secret="+planted), zap.String("uri", "/login?next=%2Ftask%3Fsecret%3D"+planted))
		},
		"fastcgi": func(l *zap.Logger) {
			l.Debug("roundtrip", zap.Dict("env", zap.String("HTTP_SECRET", planted), zap.String("HTTP_X_API_KEY", planted),
				zap.String("HTTP_AUTHORIZATION", planted), zap.String("QUERY_STRING", "secret="+planted)))
		},
		"message": func(l *zap.Logger) {
			l.Info("GET /task?secret="+url.QueryEscape(planted), zap.Strings("array", []string{"a", "https://localhost/?secret=" + planted}),
				zap.ByteString("bytes", []byte("client_secret="+planted)), zap.Reflect("reflected", response["Location"]))
		},
		"config": func(l *zap.Logger) {
			l.Debug("adjusted config", zap.Reflect("http", json.RawMessage(fmt.Sprintf(`{"secrets":[{"client":"kept","secret":%q}]}`, planted+"&"+planted))),
				zap.String("secret", planted))
		},
	}
	for _, format := range []string{
		"fsbroker",
		"fsbroker {\n wrap console\n}",
		"fsbroker {\n request>remote_port delete\n}",
		"fsbroker {\n fields {\n request>uri query {\n replace x y\n}\n}\n}",
		"fsbroker {\n request>headers>Secret delete\n}",
		"fsbroker {\n wrap filter {\n request>headers>Accept delete\n}\n}",
		"filter {\n wrap fsbroker\n request>remote_port delete\n}",
		"append {\n wrap fsbroker\n site portal\n}",
	} {
		for name, write := range entries {
			t.Run(format+"/"+name, func(t *testing.T) {
				var log bytes.Buffer
				write(zap.New(zapcore.NewCore(newEncoder(t, format), zapcore.AddSync(&log), zapcore.DebugLevel)))
				wantNoSecret(t, log.String())
				if !strings.Contains(log.String(), redact.Placeholder) || !strings.HasSuffix(log.String(), "\n") {
					t.Errorf("nothing is redacted: %s", &log)
				}
				if name == "config" && !strings.Contains(log.String(), "kept") {
					t.Errorf("too much is redacted: %s", &log)
				}
				for line := range strings.Lines(log.String()) {
					if !strings.Contains(format, "console") && !json.Valid([]byte(line)) {
						t.Errorf("not JSON: %s", line)
					}
				}
			})
		}
	}
}

func TestLogEncoderSyntax(t *testing.T) {
	for _, format := range []string{"fsbroker json", "fsbroker {\n request>uri\n}", "fsbroker {\n wrap nothing\n}"} {
		if err := new(LogEncoder).UnmarshalCaddyfile(caddyfile.NewTestDispenser(format)); err == nil {
			t.Errorf("%s: want an error", format)
		}
	}
	// The wrapped encoder is json, even if the output is a terminal.
	encoder := newEncoder(t, "fsbroker").(*LogEncoder)
	if err := encoder.ConfigureDefaultFormat(caddy.StderrWriter{}); err != nil {
		t.Fatal(err)
	}
	if buf, err := encoder.EncodeEntry(zapcore.Entry{Message: "hello"}, nil); err != nil || !json.Valid(buf.Bytes()) {
		t.Errorf("%s (%v)", buf, err)
	}
}

// BenchmarkLogEncoder encodes an entry of the access log: with `json`, with `filter` configured for what it can reach of
// the same secrets, and with `fsbroker`.
func BenchmarkLogEncoder(b *testing.B) {
	formats := []struct{ name, config string }{
		{"json", "json"},
		{"filter", `filter {
			request>uri query {
				replace secret REDACTED
				replace serect REDACTED
			}
			request>headers>Referer query {
				replace secret REDACTED
				replace serect REDACTED
			}
			resp_headers>Location query {
				replace secret REDACTED
				replace serect REDACTED
			}
			request>headers>Secret replace REDACTED
			request>headers>X-Api-Key replace REDACTED
		}`},
		{"fsbroker", "fsbroker"},
	}
	for _, test := range []struct{ name, query, secret string }{
		{"bearer", "submitID=s0", "Bearer"},
		{"query", "submitID=s0&secret=0123456789abcdef0123456789abcdef", ""},
		{"encoded", "submitID=s%200", "Bearer"},
	} {
		r := httptest.NewRequest(http.MethodGet, "/task?"+test.query, nil)
		r.Header.Set("Authorization", test.secret)
		r.Header.Set("Accept-Encoding", "gzip")
		r.Header.Set("Accept", "application/json")
		r.Header.Set("User-Agent", "Mozilla/5.0 (X11; Linux x86_64; rv:128.0) Gecko/20100101 Firefox/128.0")
		header := http.Header{
			"Server": {"Caddy"}, "Content-Type": {"application/json"}, "Etag": {`"0123456789abcdef0123456789abcdef"`},
			"Cache-Control": {"private, no-cache"}, "Cache-Status": {"fsbroker; hit; ttl=86400"}, "Age": {"1"},
			"Vary": {"Accept-Encoding"}, "X-Content-Type-Options": {"nosniff"}, "Content-Encoding": {"gzip"},
		}
		fields := []zapcore.Field{
			zap.Object("request", caddyhttp.LoggableHTTPRequest{Request: r}), zap.Int("bytes_read", 0), zap.String("user_id", "portal"),
			zap.Float64("duration", 0.0001), zap.Int("size", 15000), zap.Int("status", 200),
			zap.Object("resp_headers", caddyhttp.LoggableHTTPHeader{Header: header}),
			zap.String("fsbroker_client", "portal"), zap.String("fsbroker_cache", "hit"), zap.String("fsbroker_node", "node-1"),
		}
		for _, format := range formats {
			b.Run(test.name+"/"+format.name, func(b *testing.B) {
				encoder := newEncoder(b, format.config)
				b.ReportAllocs()
				for b.Loop() {
					buf, err := encoder.EncodeEntry(zapcore.Entry{LoggerName: "http.log.access", Message: "handled request"}, fields)
					if err != nil {
						b.Fatal(err)
					}
					buf.Free()
				}
			})
		}
	}
}
