package fsbroker

import (
	"encoding/json"

	"go.uber.org/zap"
	"go.uber.org/zap/buffer"
	"go.uber.org/zap/zapcore"

	"github.com/caddyserver/caddy/v2"
	"github.com/caddyserver/caddy/v2/caddyconfig/caddyfile"
	"github.com/caddyserver/caddy/v2/modules/caddyhttp"
	"github.com/caddyserver/caddy/v2/modules/logging"

	"github.com/caddy-fsbroker/caddy-fsbroker/internal/redact"
)

func init() {
	caddy.RegisterModule(LogEncoder{})
}

// LogEncoder is Caddy's `filter` encoder, with filters that keep the secrets of the Task API out of a log. Use it for the
// default log, which has errors and DEBUG lines as well, and for every access log with a format of its own.
//
// It replaces with `REDACTED`, in entries of all loggers and levels:
//
//   - The header fields `Authorization`, `Secret` and `X-Api-Key`, also if the server has `log_credentials`.
//   - The value of each parameter whose name ends with `secret` or `serect`, wherever it occurs: in a request's URI, in
//     the header fields `Referer` and `Location`, in a message or an error. Case does not matter, and the name may be
//     percent-encoded. A value ends at the next `&` or at the end of the text.
//   - The value of each field whose name ends with `secret` or `serect`, if it is a string. At level DEBUG, Caddy logs its
//     config, which has the secrets that are not written as placeholders.
//
// `fields` adds filters for other fields, as it does in `filter`. A filter for one of the header fields above, or for a
// field that contains them, replaces the filter that this encoder has for it, so it can reveal a secret. The other
// replacements happen after all filters, and cannot be turned off.
//
// Without `wrap`, the wrapped encoder is `json`, even if the output is a terminal.
type LogEncoder struct {
	logging.FilterEncoder
}

// CaddyModule returns the Caddy module information.
func (LogEncoder) CaddyModule() caddy.ModuleInfo {
	return caddy.ModuleInfo{
		ID:  "caddy.logging.encoders.fsbroker",
		New: func() caddy.Module { return new(LogEncoder) },
	}
}

// Provision sets up the encoder.
func (e *LogEncoder) Provision(ctx caddy.Context) error {
	if e.WrappedRaw == nil {
		e.WrappedRaw = json.RawMessage(`{"format":"json"}`)
	}
	e.Fields = secretFields() // the filter encoder adds the configured fields to these
	return e.FilterEncoder.Provision(ctx)
}

// secretFields returns the filters of the header fields that hold secrets, in all places where Caddy logs them.
func secretFields() map[string]logging.LogFieldFilter {
	fields := make(map[string]logging.LogFieldFilter)
	for _, object := range []string{
		"request>headers>", // access and error logs; reverse_proxy, php_fastcgi and rewrite at level DEBUG
		"headers>",         // the admin API; responses to reverse_proxy
		"resp_headers>",
		"push_headers>",
		"", // a filter encoder around this one does not pass on the names of objects
	} {
		fields[object+"Authorization"] = redactHeader{}
		for _, name := range secretHeaders {
			fields[object+name] = redactHeader{}
		}
	}
	for _, object := range []string{"env>", ""} { // php_fastcgi
		for _, name := range []string{"HTTP_AUTHORIZATION", "HTTP_SECRET", "HTTP_X_API_KEY"} {
			fields[object+name] = &logging.ReplaceFilter{Value: redact.Placeholder}
		}
	}
	return fields
}

// redactHeader replaces a header field in the way in which Caddy redacts Authorization.
type redactHeader struct{}

// Filter implements logging.LogFieldFilter.
func (redactHeader) Filter(in zapcore.Field) zapcore.Field {
	return zap.Array(in.Key, caddyhttp.LoggableStringArray{redact.Placeholder})
}

// UnmarshalCaddyfile sets up the module from Caddyfile tokens. The block is that of `filter`. Syntax:
//
//	fsbroker {
//	    wrap <another encoder>
//	    fields {
//	        <field> <filter> {
//	            <filter options>
//	        }
//	    }
//	    <field> <filter> {
//	        <filter options>
//	    }
//	}
func (e *LogEncoder) UnmarshalCaddyfile(d *caddyfile.Dispenser) error {
	d.Next() // consume encoder name
	if d.NextArg() {
		return d.ArgErr()
	}
	d.Reset()
	return e.FilterEncoder.UnmarshalCaddyfile(d)
}

// Clone implements zapcore.Encoder. The clone of the embedded encoder alone would not redact.
func (e *LogEncoder) Clone() zapcore.Encoder {
	return &LogEncoder{e.FilterEncoder.Clone().(logging.FilterEncoder)}
}

// EncodeEntry implements zapcore.Encoder. It redacts the encoded entry rather than its fields, because secrets are also
// in what field filters do not reach: the message, and the elements of arrays and of values that are reflected.
func (e *LogEncoder) EncodeEntry(entry zapcore.Entry, fields []zapcore.Field) (*buffer.Buffer, error) {
	buf, err := e.FilterEncoder.EncodeEntry(entry, fields)
	if err != nil {
		return buf, err
	}
	if line, found := redact.Line(buf.Bytes()); found {
		buf.Reset()
		_, err = buf.Write(line)
	}
	return buf, err
}

// Interface guards
var (
	_ caddy.Provisioner                = (*LogEncoder)(nil)
	_ caddy.ConfiguresFormatterDefault = (*LogEncoder)(nil)
	_ caddyfile.Unmarshaler            = (*LogEncoder)(nil)
	_ zapcore.Encoder                  = (*LogEncoder)(nil)
	_ logging.LogFieldFilter           = redactHeader{}
)
