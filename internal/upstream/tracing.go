package upstream

import (
	"context"
	"net/http"

	"go.opentelemetry.io/otel/attribute"
	"go.opentelemetry.io/otel/codes"
	"go.opentelemetry.io/otel/propagation"
	"go.opentelemetry.io/otel/trace"

	"github.com/caddy-fsbroker/caddy-fsbroker/internal/problem"
)

// tracerName is the instrumentation scope of the module's spans.
const tracerName = "github.com/caddy-fsbroker/caddy-fsbroker"

// traceKey is the context key of a callTrace.
type traceKey struct{}

// callTrace records the span of the last request to an upstream in a call.
type callTrace struct{ last trace.SpanContext }

// WithSpanOf returns ctx with the span of a caller, and nothing else of the caller's context. Requests to upstreams become
// spans below it. Without Caddy's tracing handler there is no span, and nothing is traced.
func WithSpanOf(ctx, caller context.Context) context.Context {
	span := trace.SpanFromContext(caller)
	if !span.SpanContext().IsValid() {
		return ctx
	}
	return context.WithValue(trace.ContextWithSpan(ctx, span), traceKey{}, new(callTrace))
}

// startSpan starts the span of a request to an upstream. It does not record the URL, which may hold a secret.
func startSpan(ctx context.Context, o Origin, host, path string) (context.Context, trace.Span) {
	ctx, span := trace.SpanFromContext(ctx).TracerProvider().Tracer(tracerName).Start(ctx, "fsbroker "+path,
		trace.WithSpanKind(trace.SpanKindClient),
		trace.WithAttributes(
			attribute.String("server.address", host),
			attribute.String("fsbroker.role", o.Role.String()),
			attribute.String("fsbroker.node", o.Name),
		))
	if call, ok := ctx.Value(traceKey{}).(*callTrace); ok {
		call.last = span.SpanContext()
	}
	return ctx, span
}

// endSpan ends a span with the outcome of its request.
func endSpan(span trace.Span, r response) {
	if r.status != 0 {
		span.SetAttributes(attribute.Int("http.response.status_code", r.status))
	}
	span.SetAttributes(attribute.String("fsbroker.outcome", outcome(r.status, r.problem)))
	if r.problem != nil && r.problem.Kind != problem.CallerLeft {
		span.SetStatus(codes.Error, r.problem.Code())
	}
	span.End()
}

// injectSpan adds the traceparent of the span in ctx, if there is one.
func injectSpan(ctx context.Context, header http.Header) {
	propagation.TraceContext{}.Inject(ctx, propagation.HeaderCarrier(header))
}

// LastSpan returns the span of the last request to an upstream in a call. It is nil if nothing is traced.
func LastSpan(ctx context.Context) *trace.SpanContext {
	if call, ok := ctx.Value(traceKey{}).(*callTrace); ok && call.last.IsValid() {
		return &call.last
	}
	return nil
}

// LinkSpan links the span of a caller to the request to an upstream that another caller started.
func LinkSpan(caller context.Context, span *trace.SpanContext) {
	if span != nil {
		trace.SpanFromContext(caller).AddLink(trace.Link{SpanContext: *span})
	}
}
