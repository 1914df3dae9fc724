//go:build generated

package main

import (
	"context"
	"encoding/json"
	"net/http"
	"os"
	"testing"

	"github.com/caddy-fsbroker/caddy-fsbroker/examples/clients/go/api"
)

// TestGenerated uses the generated client. The test of the parent folder runs it, with a site and a queued submission.
func TestGenerated(t *testing.T) {
	site, secret, queued := os.Getenv("FSBROKER_SITE"), os.Getenv("FSBROKER_SECRET"), os.Getenv("FSBROKER_SUBMIT_ID")

	get := func(params api.GetTaskParams, present func(*http.Request)) *api.GetTaskResponse {
		t.Helper()
		client, err := api.NewClientWithResponses(site)
		if err != nil {
			t.Fatal(err)
		}
		response, err := client.GetTaskWithResponse(t.Context(), &params, func(_ context.Context, r *http.Request) error {
			present(r)
			return nil
		})
		if err != nil {
			t.Fatal(err)
		}
		return response
	}
	bearer := func(r *http.Request) { r.Header.Set("Authorization", "Bearer "+secret) }
	submission := api.GetTaskParams{SubmitID: &queued}

	// Nothing yet. The broker hands the file to the node when it has answered this.
	r := get(submission, bearer)
	if r.StatusCode() != http.StatusNoContent || r.Headers204.RetryAfter < 1 || r.Headers204.CacheControl != "no-store" {
		t.Fatalf("%s %+v", r.Status(), r.Headers204)
	}

	// Waiting, as both the parameter and the header. The first wait is too short for the analysis.
	short, prefer := 1, "wait=50"
	waiting := submission
	waiting.Wait = &short
	r = get(waiting, bearer)
	switch {
	case r.StatusCode() == http.StatusNoContent && *r.Headers204.PreferenceApplied == "wait=1":
	case r.StatusCode() == http.StatusOK && r.Headers200.CacheControl == "no-store" && *r.Headers200.PreferenceApplied == "wait=1":
		if *r.JSON200.Result.TaskReference.State != "IN_PROGRESS" {
			t.Errorf("%s", r.Body)
		}
	default:
		t.Errorf("%s %v", r.Status(), r.HTTPResponse.Header)
	}
	waiting = submission
	waiting.Prefer = &prefer
	r = get(waiting, bearer)
	if r.StatusCode() != http.StatusOK || *r.JSON200.Result.TaskReference.State != "SUCCESS" || *r.Headers200.PreferenceApplied != "wait=50" {
		t.Fatalf("%s %s %v", r.Status(), r.Body, r.HTTPResponse.Header)
	}
	if len(*r.JSON200.Result.SubtaskReferences) == 0 || r.JSON200.Result.AdditionalProperties["overallState"] != "success" {
		t.Errorf("the report is %+v", r.JSON200)
	}

	// The caller has the report already.
	known := submission
	known.IfNoneMatch = &r.Headers200.ETag
	if again := get(known, bearer); again.StatusCode() != http.StatusNotModified || again.Headers304.ETag != r.Headers200.ETag {
		t.Errorf("%s %+v", again.Status(), again.Headers304)
	}

	// The caller wants another report, or a kept one only.
	another, onlyKept := `"another"`, "only-if-cached"
	wanted := submission
	wanted.IfMatch = &another
	if r := get(wanted, bearer); r.ApplicationproblemJSON412 == nil || r.ApplicationproblemJSON412.Code != api.ProblemCodePreconditionFailed {
		t.Errorf("%s %s", r.Status(), r.Body)
	}
	kept := submission
	kept.CacheControl = &onlyKept
	if r := get(kept, bearer); r.StatusCode() != http.StatusOK {
		t.Errorf("%s %s", r.Status(), r.Body)
	}
	kept.SubmitID = &another
	if r := get(kept, bearer); r.ApplicationproblemJSON504 == nil || r.ApplicationproblemJSON504.Code != api.ProblemCodeNotCached {
		t.Errorf("%s %s", r.Status(), r.Body)
	}

	// Without a secret.
	stranger, err := api.NewClientWithResponses(site)
	if err != nil {
		t.Fatal(err)
	}
	methods, err := stranger.OptionsTaskWithResponse(t.Context())
	if err != nil || methods.Headers204 == nil || methods.Headers204.Allow != "GET, HEAD, OPTIONS" {
		t.Errorf("%v: %+v", err, methods)
	}

	// Each way to present the secret.
	inQuery := func(name string) func(*http.Request) {
		return func(r *http.Request) {
			query := r.URL.Query()
			query.Set(name, secret)
			r.URL.RawQuery = query.Encode()
		}
	}
	for name, present := range map[string]func(*http.Request){
		"the header secret":    func(r *http.Request) { r.Header.Set("secret", secret) },
		"the header X-Api-Key": func(r *http.Request) { r.Header.Set("X-Api-Key", secret) },
		"the query, as secret": inQuery("secret"),
		"the query, as serect": inQuery("serect"),
	} {
		if r := get(submission, present); r.StatusCode() != http.StatusOK {
			t.Errorf("%s: %s %s", name, r.Status(), r.Body)
		}
	}

	// Problems.
	wrong := func(r *http.Request) { r.Header.Set("X-Api-Key", "wrong") }
	r = get(submission, wrong)
	if p := r.ApplicationproblemJSON401; p == nil || p.Code != api.ProblemCodeUnauthorized || r.Headers401.WWWAuthenticate != `Bearer realm="fsbroker"` {
		t.Errorf("%s %s", r.Status(), r.Body)
	}
	unknown := "no such submission"
	r = get(api.GetTaskParams{SubmitID: &unknown}, bearer)
	if p := r.ApplicationproblemJSON404; p == nil || p.Code != api.ProblemCodeUnknownSubmission || p.Detail == "" {
		t.Errorf("%s %s", r.Status(), r.Body)
	}
	r = get(api.GetTaskParams{TaskID: &unknown}, bearer)
	if p := r.ApplicationproblemJSON400; p == nil || p.Code != api.ProblemCodeMissingParameter || p.Status != http.StatusBadRequest {
		t.Errorf("%s %s", r.Status(), r.Body)
	}
	var problem api.Problem // the same for every status
	if err := json.Unmarshal(r.Body, &problem); err != nil || !problem.Code.Valid() {
		t.Errorf("%v: %s", err, r.Body)
	}

	// The example polls until there is a report.
	r, err = await(t.Context(), site, secret, queued)
	if err != nil || r.JSON200 == nil {
		t.Errorf("await returned %v, %v", r, err)
	}
	if _, err := await(t.Context(), site, secret, unknown); err == nil {
		t.Error("await returned no error for an unknown submission")
	}
}
