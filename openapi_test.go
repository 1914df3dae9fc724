package fsbroker_test

import (
	"encoding/json"
	"errors"
	"fmt"
	"maps"
	"net/http"
	"os"
	"regexp"
	"slices"
	"strconv"
	"strings"
	"testing"

	"go.yaml.in/yaml/v3"
)

// openAPI is the description of the API.
type openAPI map[string]any

func readOpenAPI(t *testing.T) openAPI {
	t.Helper()
	source, err := os.ReadFile("openapi.yaml")
	if err != nil {
		t.Fatal(err)
	}
	var d map[string]any
	if err := yaml.Unmarshal(source, &d); err != nil {
		t.Fatal(err)
	}
	return d
}

// at returns the value at a path below a value, and nil if there is none. It follows references.
func (d openAPI) at(below any, path ...string) any {
	for _, name := range path {
		object, _ := below.(map[string]any)
		below = object[name]
		for {
			object, _ := below.(map[string]any)
			ref, ok := object["$ref"].(string)
			if !ok {
				break
			}
			below = d.at(map[string]any(d), strings.Split(strings.TrimPrefix(ref, "#/"), "/")...)
		}
	}
	return below
}

// object returns the object at a path from the root.
func (d openAPI) object(path ...string) map[string]any {
	object, _ := d.at(map[string]any(d), path...).(map[string]any)
	return object
}

// check checks a JSON value against the schema at name below a value. It knows the keywords that responses need, and
// returns an error for any other.
func (d openAPI) check(below any, name string, value any) error {
	schema, ok := d.at(below, name).(map[string]any)
	if !ok {
		return errors.New("there is no schema for it")
	}
	object, _ := value.(map[string]any)
	properties, _ := schema["properties"].(map[string]any)
	for keyword, want := range schema {
		ok := true
		switch keyword {
		case "description", "format", "properties": // the properties are checked below
		case "type":
			ok = isType(value, want)
		case "const":
			ok = value == want
		case "enum":
			ok = slices.Contains(want.([]any), value)
		case "minimum":
			number, _ := value.(float64)
			ok = number >= float64(want.(int))
		case "required":
			for _, name := range want.([]any) {
				_, exists := object[name.(string)]
				ok = ok && exists
			}
		case "additionalProperties":
			for name := range object {
				ok = ok && (want == true || properties[name] != nil)
			}
		case "items":
			for _, item := range value.([]any) {
				if err := d.check(schema, "items", item); err != nil {
					return err
				}
			}
		default:
			return fmt.Errorf("this test does not know the keyword %s", keyword)
		}
		if !ok {
			return fmt.Errorf("%v does not match %s: %v", value, keyword, want)
		}
	}
	for name := range properties {
		if member, exists := object[name]; exists {
			if err := d.check(properties, name, member); err != nil {
				return fmt.Errorf("%s: %w", name, err)
			}
		}
	}
	return nil
}

// isType reports whether a JSON value has a schema's type.
func isType(value, want any) bool {
	switch v := value.(type) {
	case string:
		return want == "string"
	case bool:
		return want == "boolean"
	case float64:
		return want == "number" || want == "integer" && v == float64(int64(v))
	case []any:
		return want == "array"
	case map[string]any:
		return want == "object"
	}
	return false
}

// checkResponse checks a response against the description of its status.
func (d openAPI) checkResponse(t *testing.T, method string, r reply) {
	t.Helper()
	response := d.object("paths", "/task", strings.ToLower(method), "responses", strconv.Itoa(r.status))
	if response == nil {
		t.Fatalf("status %d is not described", r.status)
	}

	header := r.header.Clone()
	for _, name := range []string{
		"Alt-Svc", "Date", "Server", // Caddy's own
		"Content-Length",
		"Content-Type", // part of the content's description
	} {
		header.Del(name)
	}
	fields, _ := response["headers"].(map[string]any)
	for name := range fields {
		field := d.at(fields, name)
		values := header.Values(name)
		header.Del(name)
		if len(values) == 0 {
			if d.at(field, "required") == true {
				t.Errorf("%s is missing", name)
			}
			continue
		}
		var value any = values[0]
		if d.at(field, "schema", "type") == "integer" {
			number, err := strconv.ParseFloat(values[0], 64)
			if err != nil {
				t.Errorf("%s: %v", name, err)
			}
			value = number
		}
		if err := d.check(field, "schema", value); err != nil {
			t.Errorf("%s: %v", name, err)
		}
	}
	for name := range header {
		t.Errorf("%s is not described", name)
	}

	contentType := r.header.Get("Content-Type")
	content, _ := response["content"].(map[string]any)
	switch {
	case contentType == "" && content == nil && len(r.body) == 0, // there is no content
		method == http.MethodHead && content[contentType] != nil && len(r.body) == 0:
		return
	}
	var body any
	if err := json.Unmarshal([]byte(r.plain(t)), &body); err != nil {
		t.Fatalf("%v: %s", err, r.body)
	}
	if err := d.check(d.at(content, contentType), "schema", body); err != nil {
		t.Errorf("the body, %s: %v", contentType, err)
	}
}

func TestOpenAPIDescribesResponses(t *testing.T) { inBubble(t, testDescribedResponses) }

func testDescribedResponses(t *testing.T) {
	d := readOpenAPI(t)
	node := newBackend(t, func(w http.ResponseWriter, r *http.Request) {
		switch task := r.URL.Query().Get("taskID"); task {
		case "unknown":
			responds(http.StatusNotFound, "")(w, r)
		case "empty":
			responds(http.StatusNoContent, "")(w, r)
		case "busy":
			w.Header().Set("Retry-After", "7")
			responds(http.StatusTooManyRequests, "")(w, r)
		case "slow":
			<-r.Context().Done()
		case "running":
			responds(http.StatusOK, reportOf(task, "IN_PROGRESS"))(w, r)
		default:
			responds(http.StatusOK, reportOf(task, "SUCCESS", "FAILED"))(w, r)
		}
	})
	s := startSite(t, options(node, fmt.Sprintf("node closed %s\ntimeout 500ms", refused(t)))+fmt.Sprintf(`
	handle_path /barred/* {
		fsbroker_task {
			secret {env.CALLER_SECRET} {
				allow /submit
			}
			broker %s {
				proxy /submit
			}
			cache {
				namespace barred
			}
		}
	}`, node.URL))
	etag := s.get(pair).header.Get("ETag")

	const task = "/task?appServerID=node-1&taskID="
	provoked := make(map[string]bool)
	for _, test := range []struct {
		method, path string
		header       string
		status       int
	}{
		{"GET", task + "t2", "", 200},
		{"GET", task + "t2", "", 200}, // kept
		{"GET", task + "t2&nocache", "", 200},
		{"GET", task + "t2&all", "Accept-Encoding: gzip", 200},
		{"HEAD", task + "t2", "", 200},
		{"GET", task + "running", "", 200},
		{"GET", task + "t2&wait=1", "", 200},
		{"GET", task + "t2", "Prefer: wait=1", 200},
		{"GET", task + "empty", "", 204},
		{"GET", task + "empty&wait=1", "", 204},
		{"GET", task + "empty", "Prefer: wait=1", 204},
		{"GET", pair, "If-None-Match: " + etag, 304},
		{"GET", "/task?sha256=" + strings.Repeat("0", 64), "", 404},
		{"GET", "/task?wait=1&sha256=" + strings.Repeat("0", 64), "", 400},
		{"GET", "/task", "", 400},
		{"HEAD", "/task", "", 400},
		{"GET", "/task?submitID=s1", "", 400},
		{"GET", pair, "Authorization: Bearer wrong", 401},
		{"GET", pair, "Authorization: Basic wrong", 401},
		{"POST", pair, "Authorization: Bearer wrong", 401},
		{"GET", "/barred/task", "", 403},
		{"GET", task + "unknown", "", 404},
		{"GET", task + "unknown", "Prefer: wait=1", 404},
		{"GET", "/task?appServerID=node-2&taskID=t2", "", 404},
		{"POST", pair, "", 405},
		{"OPTIONS", pair, "", 204},
		{"OPTIONS", "/task", "Authorization: Bearer wrong", 204},
		{"GET", pair, "If-Match: " + etag, 200},
		{"GET", pair, `If-Match: "another"`, 412},
		{"HEAD", pair, `If-Match: "another"`, 412},
		{"GET", task + "running&wait=1", `If-Match: "another"`, 412},
		{"GET", pair, "Cache-Control: no-cache", 200},
		{"GET", pair, "Cache-Control: only-if-cached", 200},
		{"GET", task + "elsewhere", "Cache-Control: only-if-cached", 504},
		{"GET", "/task?appServerID=closed&taskID=t2", "", 502},
		{"GET", "/task?appServerID=closed&taskID=t2", "", 503},
		{"GET", task + "slow", "", 504},
		{"GET", task + "busy", "", 503},
	} {
		header := []string{"Authorization: Bearer " + callerSecret}
		if strings.HasPrefix(test.header, "Authorization") {
			header = nil
		}
		if test.header != "" {
			header = append(header, test.header)
		}
		r := s.do(t.Context(), test.method, test.path, header...)
		if r.status != test.status {
			t.Fatalf("%v: status %d: %s", test, r.status, r.body)
		}
		if test.method != http.MethodOptions {
			provoked[strconv.Itoa(r.status)] = true
		}
		if test.method == http.MethodPost { // described with GET
			test.method = http.MethodGet
		}
		if d.checkResponse(t, test.method, r); t.Failed() {
			t.Fatalf("in the response to %v", test)
		}
	}
	provoked["500"] = true // only happens when memory is damaged
	described := slices.Sorted(maps.Keys(d.object("paths", "/task", "get", "responses")))
	if want := slices.Sorted(maps.Keys(provoked)); !slices.Equal(described, want) {
		t.Errorf("openapi.yaml describes the statuses %v, but there are %v", described, want)
	}
}

func TestOpenAPIDescribesEveryProblem(t *testing.T) {
	d := readOpenAPI(t)
	described := make(map[string]bool)
	codes, _ := d.object("components", "schemas", "Problem", "properties", "code")["enum"].([]any)
	for _, code := range codes {
		described[code.(string)] = true
	}
	if want := problemCodes(t); !maps.Equal(described, want) {
		t.Errorf("openapi.yaml describes the codes %v, but there are %v", described, want)
	}
}

func TestOpenAPIDescribesEveryParameter(t *testing.T) {
	d := readOpenAPI(t)
	described := make(map[string]bool)
	add := func(parameter map[string]any) {
		if parameter["in"] == "query" {
			described[parameter["name"].(string)] = true
		}
	}
	for name := range d.object("components", "securitySchemes") {
		add(d.object("components", "securitySchemes", name))
	}
	parameters, _ := d.at(d.object("paths", "/task", "get"), "parameters").([]any)
	for _, parameter := range parameters {
		add(d.at(map[string]any{"": parameter}, "").(map[string]any))
	}

	source, err := os.ReadFile("query.go")
	if err != nil {
		t.Fatal(err)
	}
	// The source has a case for each parameter.
	found := regexp.MustCompile(`case "(\w+)":\n`).FindAllSubmatch(source, -1)
	if len(found) < 7 {
		t.Errorf("the source has only %d parameters", len(found))
	}
	for _, match := range found {
		if !described[string(match[1])] {
			t.Errorf("%s is not described", match[1])
		}
	}
}

// Every security scheme lets a caller in, and the description has every header that the handler takes a secret from.
func TestOpenAPIDescribesAuthentication(t *testing.T) {
	d := readOpenAPI(t)
	node := newBackend(t, responds(http.StatusOK, reportOf("t1", "SUCCESS")))
	s := startSite(t, options(node, ""))
	schemes := d.object("components", "securitySchemes")

	var required []string
	alternatives, _ := d["security"].([]any)
	for _, alternative := range alternatives {
		for name := range alternative.(map[string]any) {
			required = append(required, name)
		}
	}
	slices.Sort(required)
	if want := slices.Sorted(maps.Keys(schemes)); !slices.Equal(required, want) {
		t.Errorf("the schemes are %v, but security has %v", want, required)
	}

	described := make(map[string]bool) // headers
	for name := range schemes {
		t.Run(name, func(t *testing.T) {
			scheme := d.object("components", "securitySchemes", name)
			for secret, status := range map[string]int{callerSecret: http.StatusOK, "wrong": http.StatusUnauthorized} {
				path, header := pair, []string(nil)
				field, _ := scheme["name"].(string)
				switch {
				case scheme["type"] == "http" && scheme["scheme"] == "bearer":
					header = append(header, "Authorization: Bearer "+secret)
				case scheme["type"] == "apiKey" && scheme["in"] == "header":
					described[http.CanonicalHeaderKey(field)] = true
					header = append(header, field+": "+secret)
				case scheme["type"] == "apiKey" && scheme["in"] == "query":
					path += "&" + field + "=" + secret
				default:
					t.Fatalf("this test does not know the scheme %v", scheme)
				}
				r := s.in(t).do(t.Context(), http.MethodGet, path, header...)
				r.wantStatus(t, status)
				d.checkResponse(t, http.MethodGet, r)
			}
		})
	}

	source, err := os.ReadFile("auth.go")
	if err != nil {
		t.Fatal(err)
	}
	list := regexp.MustCompile(`secretHeaders = .*{(.*)}`).FindSubmatch(source)
	if list == nil {
		t.Fatal("the source has no list of headers")
	}
	for _, match := range regexp.MustCompile(`"([^"]+)"`).FindAllSubmatch(list[1], -1) {
		if !described[string(match[1])] {
			t.Errorf("the header %s is not described", match[1])
		}
	}
}
